"""A config as YAML that `load_config` reads back: plain, or with what each setting means as comments."""

from __future__ import annotations

import dataclasses
import enum
import re
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from mmattn.config.schema import choices, is_union, type_words
from mmattn.config.settings import MISSING, Setting

_COMMENT_WIDTH = 100
_FIXED_SPACE = "\N{NO-BREAK SPACE}"  # where a comment is not to be wrapped
_RECIPE_TEXT = "What is trained; `mmattn ls` lists the recipes."


def to_yaml(config: Any, recipe: str | None = None) -> str:
    """A config (dataclass instance) as YAML that `load_config` reads back.

    Args:
        config: the dataclass instance.
        recipe: the recipe's name, written as the `recipe:` key at the top.
    """
    values = _plain(config)
    if recipe is not None:
        values = {"recipe": recipe, **values}
    return _dump(values)


def settings_yaml(settings: Iterable[Setting], *, recipe: str | None = None, explain: bool = True) -> str:
    """Settings as YAML, each below its sections.

    Args:
        settings: all of a config, or some.
        recipe: the recipe's name, written as the `recipe:` key at the top.
        explain: write above each setting what it means, as a comment.
    """
    blocks, last_depth = [], 0
    if recipe is not None:
        blocks.append((f"# {_RECIPE_TEXT}\n" if explain else "") + _dump({"recipe": recipe}))
    written: set[str] = set()
    for setting in settings:
        *parents, name = setting.key.split(".")
        for depth in range(len(parents)):
            if (section := ".".join(parents[: depth + 1])) not in written:
                written.add(section)
                blocks.append(_indented(f"{parents[depth]}:\n", depth))
        written.add(setting.key)
        text = f"{name}:\n" if setting.is_section else _dump({name: _plain(setting.value)})
        comment = _comment(setting, len(parents)) if explain else ""
        is_apart = explain and bool(blocks) and (setting.is_section or len(parents) < last_depth)
        blocks.append("\n" * is_apart + _indented(comment + text, len(parents)))
        last_depth = len(parents)
    return "".join(blocks)


def yaml_words(value: Any) -> str:
    """A value as YAML writes it, in one line: `1.0e-05`, `[a, b]`, `''`."""
    return yaml.safe_dump([_plain(value)], default_flow_style=True, allow_unicode=True, width=1e6)[1:-2]


def _comment(setting: Setting, depth: int) -> str:
    facts = f"[{'; '.join(found)}]" if (found := _facts(setting)) else ""
    if len(facts) < _COMMENT_WIDTH // 2:
        facts = facts.replace(" ", _FIXED_SPACE)
    lines = textwrap.wrap(
        f"{setting.text} {facts}".strip(),
        _COMMENT_WIDTH - 2 * depth,
        initial_indent="# ",
        subsequent_indent="# ",
        break_long_words=False,
        break_on_hyphens=False,
    )
    return "".join(f"{line}\n" for line in lines).replace(_FIXED_SPACE, " ")


def _facts(setting: Setting) -> list[str]:
    """What the type says where the value does not, and the default where it is another."""
    if setting.is_section:
        return []
    is_hidden = is_union(setting.kind) or bool(choices(setting.kind)) or setting.value in ([], {})
    facts = [type_words(setting.kind)] if is_hidden else []
    if setting.default is not MISSING and setting.default != setting.value:
        facts.append(f"default {yaml_words(setting.default)}")
    return facts


def _indented(text: str, depth: int) -> str:
    return re.sub(r"^(?=.)", "  " * depth, text, flags=re.MULTILINE)


def _dump(values: Any) -> str:
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=120)


def _plain(value: Any) -> Any:
    """Only what plain YAML can say: mappings, lists, strings, numbers, booleans, null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, Path):
        return str(value)
    return value
