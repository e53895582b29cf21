"""The settings of a config one by one: each with its value, its default, and what its dataclass's docstring says."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mmattn.config.resolve import nearest
from mmattn.config.schema import field_types
from mmattn.errors import ConfigError

MISSING = dataclasses.MISSING
_ENTRY = re.compile(r" {4}(\w+(?:, \w+)*): *(.*)")
_YAML_WORDS = {"None": "null", "True": "true", "False": "false"}


@dataclass(frozen=True)
class Setting:
    """One setting of a config, or a section of them.

    Attributes:
        key: its path, such as `training.max_steps`.
        owner: the dataclass that has it.
        kind: its type.
        value: what it is set to; of a section the dataclass that holds its settings.
        default: what it is where nothing is said; `MISSING` in a section that is then not there.
        text: what it means; '' where no docstring says.
    """

    key: str
    owner: type
    kind: Any
    value: Any
    default: Any
    text: str

    @property
    def is_section(self) -> bool:
        """Whether it holds settings of its own."""
        return dataclasses.is_dataclass(self.value)


def settings_of(config: Any, defaults: Any, prefix: str = "") -> Iterator[Setting]:
    """Every setting in the order of the dataclasses' fields, a section before what it holds.

    Args:
        config: the dataclass instance.
        defaults: one of the same dataclass in which nothing was set.
        prefix: of the keys.
    """
    owner = type(config)
    texts = field_texts(owner)
    for name, kind in field_types(owner).items():
        value, default = getattr(config, name), getattr(defaults, name, MISSING)
        setting = Setting(prefix + name, owner, kind, value, default, texts.get(name, ""))
        if setting.is_section:
            text = " ".join(filter(None, (about(type(value)), setting.text)))
            yield dataclasses.replace(setting, text=text)
            yield from settings_of(value, default, f"{prefix}{name}.")
        else:
            yield setting


def part_of(settings: Sequence[Setting], key: str) -> list[Setting]:
    """One setting, or a section with all that it holds.

    Raises:
        ConfigError: no such key; names the nearest.
    """
    found = [setting for setting in settings if setting.key == key or setting.key.startswith(f"{key}.")]
    if found:
        return found
    known = [setting.key for setting in settings]
    of_that_name = [repr(other) for other in known if other.endswith(f".{key}")]
    hint = f" Did you mean {' or '.join(of_that_name)}?" if of_that_name else nearest(key, known)
    top = ", ".join(other for other in known if "." not in other)
    raise ConfigError(f"unknown key {key!r}.{hint or f' Known keys: {top}, and what is in them'}")


def about(schema: type) -> str:
    """What a dataclass is: its docstring up to the arguments, in one paragraph."""
    return _in_yaml_words(_docstring(schema).partition("\nArgs:")[0])


def field_texts(schema: type) -> dict[str, str]:
    """What the `Args:` of a dataclass's docstring, and of its bases', say of each field."""
    found: dict[str, str] = {}
    for base in reversed(schema.__mro__):
        names: list[str] = []
        texts: list[str] = []
        for line in _docstring(base).partition("\nArgs:\n")[2].split("\n\n", 1)[0].splitlines():
            if entry := _ENTRY.fullmatch(line):
                names, texts = entry[1].split(", "), []
            texts.append(entry[2] if entry else line)
            found |= dict.fromkeys(names, _in_yaml_words(" ".join(texts)))
    return found


def _docstring(schema: type) -> str:
    text = inspect.cleandoc(schema.__doc__ or "") if dataclasses.is_dataclass(schema) else ""
    is_made = text.startswith(f"{schema.__name__}(")  # by `dataclass`, where the class has none
    return "" if is_made else text


def _in_yaml_words(text: str) -> str:
    return re.sub(r"\b(None|True|False)\b", lambda word: _YAML_WORDS[word[0]], " ".join(text.split()))
