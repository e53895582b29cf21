"""What the annotations of a config's dataclasses say: types, sections, and the words for them."""

from __future__ import annotations

import dataclasses
import enum
import types
import typing
from pathlib import Path
from typing import Any

_UNIONS = (typing.Union, types.UnionType)
_WORDS = {
    int: "whole number",
    float: "number",
    str: "text",
    bool: "true or false",
    Path: "path",
    type(None): "null",
    Any: "anything",
}


def field_types(schema: type) -> dict[str, Any]:
    """The fields of a dataclass in their order, with their types."""
    hints = typing.get_type_hints(schema)
    return {field.name: hints[field.name] for field in dataclasses.fields(schema)}


def dataclass_in(annotation: Any) -> type | None:
    """The dataclass in `X`, `X | None` or `list[X]`; None for anything else."""
    if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
        return annotation
    if typing.get_origin(annotation) in (*_UNIONS, list):
        found = [inner for inner in map(dataclass_in, typing.get_args(annotation)) if inner is not None]
        return found[0] if len(found) == 1 else None
    return None


def is_union(annotation: Any) -> bool:
    """Whether a value may be of one of several types, null among them."""
    return typing.get_origin(annotation) in _UNIONS


def choices(annotation: Any) -> list[str]:
    """The values that a `Literal` or an enum allows, as YAML writes them; empty for other types."""
    if typing.get_origin(annotation) is typing.Literal:
        return [str(value) for value in typing.get_args(annotation)]
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return [member.name for member in annotation]
    return []


def type_words(annotation: Any) -> str:
    """A type in the words of somebody who writes YAML: "whole number or null", "list of texts"."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if is_union(annotation):
        return " or ".join(map(type_words, inner))
    if found := choices(annotation):
        return f"one of {', '.join(found)}"
    if origin is list:
        return f"list of {_plural(inner[0])}"
    if origin is tuple:
        return f"{len(inner)} {_plural(inner[0])}"
    if origin is dict:
        return f"{_plural(inner[1])} by name"
    if dataclass_in(annotation) is not None:
        return "section"
    return _WORDS[annotation]


def _plural(annotation: Any) -> str:
    words = type_words(annotation)
    return words if annotation in (bool, Any) else f"{words}s"
