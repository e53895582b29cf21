"""Config dataclasses from plain values, checked: unknown fields and wrong types are errors."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from typing import Any

from mmattn.errors import ConfigError

_COUNTS = ("embed_dim", "num_heads", "num_kv_heads", "ffn_dim", "max_positions", "image_size", "patch_size", "grid")
_COUNTS += ("encoder_ffn_dim", "decoder_ffn_dim")
_NOT_NEGATIVE = ("norm_eps", "position_std", "initializer_range")
_PARTS = ("dropout_p", "attention_dropout_p", "activation_dropout_p")


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


def require_ranges(config: Any, prefix: str = "") -> None:
    """Raise `ConfigError` for a number that no network can be made or trained with, by the name of its field."""
    rules = {
        **{name: ("at least 1", lambda value: value >= 1) for name in _COUNTS},
        **{name: ("0 or more", lambda value: 0 <= value < math.inf) for name in _NOT_NEGATIVE},
        **{name: ("between 0 and 1", lambda value: 0 <= value <= 1) for name in _PARTS},
        "label_smoothing": ("at least 0 and below 1", lambda value: 0 <= value < 1),
    }
    for entry in dataclasses.fields(config):
        value = getattr(config, entry.name)
        if value is not None and entry.name in rules and not rules[entry.name][1](value):
            raise ConfigError(f"{prefix}{entry.name} is {value}: it must be {rules[entry.name][0]}")


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
