from __future__ import annotations

import enum
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from mmattn.config import (
    list_configs,
    load_config,
    load_recipe,
    part_of,
    recipe_of,
    settings_of,
    settings_yaml,
    to_yaml,
)
from mmattn.config.dump import yaml_words
from mmattn.config.schema import type_words


class Colour(enum.Enum):
    red = 1
    blue = 2


@dataclass
class Training:
    """How it goes.

    Args:
        max_steps: Steps of the whole run, which are counted from one on and of which there are as many as there are.
        schedule: How the rate falls.
        batch_tokens: Instead of a number of examples. None: none.
    """

    max_steps: int = 5
    schedule: Literal["cosine", "constant"] = "cosine"
    batch_tokens: int | None = None


@dataclass
class Config:
    """All of it.

    Args:
        name: What to call it.
        colour: Of what is drawn.
        training: Here.
        words: Any number of them.
    """

    name: str = "default"
    colour: Colour = Colour.red
    training: Training = field(default_factory=Training)
    words: list[str] = field(default_factory=list)
    plain: int = 7


EXPLAINED = """\
# What is trained; `mmattn ls` lists the recipes.
recipe: toy
# What to call it.
name: default
# Of what is drawn. [one of red, blue; default red]
colour: blue

# How it goes. Here.
training:
  # Steps of the whole run, which are counted from one on and of which there are as many as there
  # are. [default 5]
  max_steps: 17
  # How the rate falls. [one of cosine, constant]
  schedule: cosine
  # Instead of a number of examples. null: none. [whole number or null]
  batch_tokens: null

# Any number of them. [list of texts]
words: []
plain: 7
"""


def test_each_setting_is_explained_above_it(tmp_path: Path):
    config = load_config(Config, None, ["colour=blue", "training.max_steps=17"])
    settings = list(settings_of(config, Config()))
    shown = settings_yaml(settings, recipe="toy")
    assert shown == EXPLAINED
    (tmp_path / "my.yaml").write_text(shown)
    assert load_config(Config, tmp_path / "my.yaml") == config
    assert settings_yaml(settings, recipe="toy", explain=False) == to_yaml(config, recipe="toy")


def test_a_part_stands_below_its_sections(tmp_path: Path):
    settings = list(settings_of(Config(), Config()))
    shown = settings_yaml(part_of(settings, "training.schedule"))
    assert shown == "training:\n  # How the rate falls. [one of cosine, constant]\n  schedule: cosine\n"
    assert settings_yaml(part_of(settings, "training"), explain=False) == (
        "training:\n  max_steps: 5\n  schedule: cosine\n  batch_tokens: null\n"
    )


@pytest.mark.parametrize(
    "text",
    [
        "no",
        "# none",
        "a: b",
        " spaces ",
        "",
        "two\nlines\n\nand more",
        "x  y " * 60,
        "\N{LINE SEPARATOR}a",
        "'\"\\",
        "é",
    ],
)
def test_any_text_reads_back(text: str, tmp_path: Path):
    config = Config(name=text, words=[text, "b"])
    (tmp_path / "my.yaml").write_text(settings_yaml(settings_of(config, Config())), encoding="utf-8")
    assert load_config(Config, tmp_path / "my.yaml") == config


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        (int | None, "whole number or null"),
        (bool | str, "true or false or text"),
        (list[bool], "list of true or false"),
        (list[float] | None, "list of numbers or null"),
        (tuple[float, float], "2 numbers"),
        (dict[str, float], "numbers by name"),
        (dict[str, Any], "anything by name"),
        (list[Training], "list of sections"),
        (Literal["a", "b"] | None, "one of a, b or null"),
        (Path, "path"),
    ],
)
def test_types_in_words(annotation: Any, words: str):
    assert type_words(annotation) == words


@pytest.mark.parametrize(
    ("value", "words"), [(1e-5, "1.0e-05"), ("no", "'no'"), ((1, 2), "[1, 2]"), (None, "null"), (["a" * 90, "b"], None)]
)
def test_values_in_one_line(value: Any, words: str | None):
    assert yaml_words(value) == (words or f"[{value[0]}, b]")


@pytest.mark.parametrize("name", list_configs())
def test_a_shipped_config_explained_is_the_same_config(name: str, tmp_path: Path):
    recipe = recipe_of(name)
    schema = load_recipe(recipe).Config
    config = load_config(schema, name)
    settings = list(settings_of(config, load_config(schema, None)))
    file = tmp_path / "my.yaml"
    file.write_text(settings_yaml(settings, recipe=recipe), encoding="utf-8")
    assert recipe_of(file) == recipe
    assert load_config(schema, file) == config
    lines = file.read_text(encoding="utf-8").splitlines()
    assert max(len(line) for line in lines if line.lstrip().startswith("#")) <= 100
