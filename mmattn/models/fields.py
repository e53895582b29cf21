"""Config dataclasses from plain values, checked: unknown fields and wrong types are errors."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any

from mmattn.errors import ConfigError


def fill(schema: type[Any], values: dict[str, Any], prefix: str = "") -> Any:
    """A dataclass from the values of its fields.

    Args:
        schema: the dataclass.
        values: by field name; fields that are left out keep their defaults.
        prefix: what stands before a field's name in messages, `text.` say.

    Raises:
        ConfigError: a field that does not exist, or a value of another type.
    """
    known = [entry.name for entry in dataclasses.fields(schema)]
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ConfigError(f"no such field: {prefix}{f', {prefix}'.join(unknown)}; known: {', '.join(known)}")
    hints = typing.get_type_hints(schema)
    for name, value in values.items():
        if not _fits(value, hints[name]):
            raise ConfigError(
                f"{prefix}{name} is {value!r}, it must be {getattr(hints[name], '__name__', hints[name])}"
            )
    return schema(**values)


def _fits(value: Any, hint: Any) -> bool:
    arguments = typing.get_args(hint)
    origin = typing.get_origin(hint)
    if origin is types.UnionType:
        return any(_fits(value, choice) for choice in arguments)
    if origin is list:
        return isinstance(value, list) and all(_fits(entry, arguments[0]) for entry in value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, origin or hint)
