"""Loads a typed config: defaults of a dataclass < YAML file < `key.path=value` overrides.

OmegaConf's structured configs do the checking of types; unknown keys are found here, so that the error can name the
nearest known key and the file or override that holds the wrong one.
"""

from __future__ import annotations

import typing
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mmattn.config.resolve import config_path, nearest
from mmattn.config.schema import dataclass_in, field_types, is_union
from mmattn.errors import ConfigError, MmattnError

T = TypeVar("T")


def load_config(
    schema: type[T], source: str | Path | None, overrides: Sequence[str] = (), *, is_saved: bool = False
) -> T:
    """Build `schema` from its defaults, a file, and overrides; each later one wins.

    Args:
        schema: a dataclass type; nested dataclasses, lists, dicts, optional values and literals are allowed.
        source: a YAML file, the name of a shipped config, or None for the defaults alone. A `recipe:` key that names
            the recipe is allowed at the top even when `schema` has no such field.
        overrides: `key.path=value` strings; the value is read as YAML (`3`, `1e-4`, `null`, `[a, b]`).
        is_saved: a run wrote the file, perhaps with another version: settings that there no longer are are left out,
            with a warning.

    Raises:
        ConfigError: no such file, not YAML, an unknown key, a wrong type, a value that is required and missing, or a
            value that the dataclass itself refuses.
    """
    node = OmegaConf.structured(schema)
    if source is not None:
        path = config_path(source)
        values = _read_yaml(path)
        if "recipe" not in field_types(schema):
            values.pop("recipe", None)
        if is_saved:
            values = _known(schema, values, str(path), prefix="")
        node = _merge(schema, node, values, str(path))
    for override in overrides:
        node = _merge(schema, node, _parse_override(override), f"override {override!r}")
    return _to_object(node, str(source) if source is not None else "config")


def recipe_of(source: str | Path) -> str:
    """The recipe that a config file names in its `recipe:` key.

    Raises:
        ConfigError: no such file, not YAML, or no `recipe:` key.
    """
    path = config_path(source)
    name = _read_yaml(path).get("recipe")
    if not isinstance(name, str):
        raise ConfigError(f"{path}: names no recipe; add a line such as 'recipe: vlm' at the top")
    return name


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = OmegaConf.load(path)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {_one_line(error)}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not a text file (UTF-8)") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read as YAML: {_one_line(error)}") from error
    if not isinstance(content, DictConfig):
        raise ConfigError(f"{path}: must hold 'key: value' lines at the top, not a list")
    values = OmegaConf.to_container(content, resolve=False)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def _parse_override(override: str) -> dict[str, Any]:
    key, equals, value = override.partition("=")
    key = key.strip()
    if key.startswith("-"):
        plain = key.lstrip("-")
        raise ConfigError(f"no such option: {key}; a config value is set without dashes: {plain or 'key.path'}=VALUE")
    if not equals or not key:
        raise ConfigError(f"override {override!r}: must be key.path=value, for example training.max_steps=100")
    _refuse_comment(override, value)
    try:
        node = OmegaConf.from_dotlist([f"{key}={value}"])
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"override {override!r}: the value is not valid YAML: {_one_line(error)}") from error
    values = OmegaConf.to_container(node, resolve=False)
    assert isinstance(values, dict)
    return {str(name): value for name, value in values.items()}


def _refuse_comment(override: str, value: str) -> None:
    """In a file a comment is meant, on a command line it is a folder or a prompt of which the rest would be lost."""
    try:
        *tokens, _ = yaml.scan(value)
    except yaml.YAMLError:
        return  # said by who reads it
    end = max(token.end_mark.index for token in tokens)
    if value[end:].lstrip().startswith("#"):
        raise ConfigError(
            f"override {override!r}: in YAML ' #' begins a comment: put quotes inside, as in a='\"b #c\"'"
        )


def _merge(schema: type, node: DictConfig, values: Mapping[str, Any], where: str) -> DictConfig:
    _check_keys(schema, values, where, prefix="")
    try:
        merged = OmegaConf.merge(node, values)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{where}: {_explain(error)}") from error
    assert isinstance(merged, DictConfig)
    return merged


def _to_object(node: DictConfig, where: str) -> Any:
    try:
        missing = sorted(OmegaConf.missing_keys(node))
        if missing:
            raise ConfigError(f"{where}: needs a value for {', '.join(missing)}")
        return OmegaConf.to_object(node)
    except MmattnError:
        raise
    except OmegaConfBaseException as error:
        raise ConfigError(f"{where}: {_explain(error)}") from error
    except (ValueError, TypeError) as error:  # raised by a dataclass's own __post_init__
        raise ConfigError(f"{where}: {_one_line(error)}") from error


def _known(schema: type, values: Mapping[str, Any], where: str, prefix: str) -> dict[str, Any]:
    fields, kept = field_types(schema), {}
    for key, value in values.items():
        if key not in fields:
            gone = f"{where} has a setting that there no longer is, which is left out: {prefix + key}, {value!r}"
            warnings.warn(gone, stacklevel=3)
            continue
        inner = dataclass_in(fields[key])
        if inner is not None and isinstance(value, Mapping):
            kept[key] = _known(inner, value, where, f"{prefix}{key}.")
        else:
            kept[key] = value
    return kept


def _check_keys(schema: type, values: Mapping[str, Any], where: str, prefix: str) -> None:
    fields = field_types(schema)
    for key, value in values.items():
        if key not in fields:
            names = [prefix + field for field in fields]
            hint = nearest(key, fields, prefix) or f" Known keys: {', '.join(names)}"
            raise ConfigError(f"{where}: unknown key {prefix + key!r}.{hint}")
        inner = dataclass_in(fields[key])
        _check_length(fields[key], value, f"{where}: {prefix + key!r}")
        if inner is None:
            if isinstance(value, bool) and _is_text(fields[key]):
                raise ConfigError(
                    f"{where}: {prefix + key!r} is a text, and YAML takes yes, no, on, off, true and false without "
                    f"quotes for truth values: put it in quotes, such as {prefix + key}=\"'no'\""
                )
            continue
        if value is None and not is_union(fields[key]) and _sequence(fields[key]) is None:
            raise ConfigError(f"{where}: {prefix + key!r} is a section, and empty: set its keys, or leave it out")
        if not isinstance(value, Mapping | None) and not (isinstance(value, list) and _sequence(fields[key])):
            example = f"{prefix}{key}.{next(iter(field_types(inner)))}"
            raise ConfigError(f"{where}: {prefix + key!r} is a section, not a value; set its keys, such as {example}")
        for name, entry in _entries(value, prefix + key):
            _check_keys(inner, entry, where, f"{name}.")


def _check_length(annotation: Any, value: Any, what: str) -> None:
    """Of a list, and of a tuple, whose number of values is fixed; OmegaConf's own words are those of its classes."""
    kind = _sequence(annotation)
    is_later = isinstance(value, str) and (value == "???" or value.startswith("${"))
    if kind is None or value is None or is_later:
        return
    if not isinstance(value, list | tuple):
        raise ConfigError(f"{what} is a list, not a single value: put it in brackets, such as [{value}]")
    wanted = typing.get_args(kind)
    if typing.get_origin(kind) is tuple and ... not in wanted and len(value) != len(wanted):
        raise ConfigError(f"{what} takes {len(wanted)} values, not {len(value)}")


def _sequence(annotation: Any) -> Any:
    """`list[X]` or `tuple[...]`, also of such a thing or None; None for anything else."""
    kinds = [annotation]
    if is_union(annotation):
        kinds = [kind for kind in typing.get_args(annotation) if kind is not type(None)]
    return kinds[0] if len(kinds) == 1 and typing.get_origin(kinds[0]) in (list, tuple) else None


def _entries(value: Any, name: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if isinstance(value, Mapping):
        yield name, value
    elif isinstance(value, list):
        for index, entry in enumerate(value):
            if isinstance(entry, Mapping):
                yield f"{name}[{index}]", entry


def _is_text(annotation: Any) -> bool:
    kinds = typing.get_args(annotation) or (annotation,)
    return str in kinds and bool not in kinds and typing.get_origin(annotation) is not list


def _explain(error: OmegaConfBaseException) -> str:
    message = (error.msg or str(error)).splitlines()[0]
    if "$VALUE" in message:  # OmegaConf left its own template unfilled (values inside a tuple)
        message = "a value has the wrong type"
    return f"{error.full_key}: {message}" if error.full_key else message


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
