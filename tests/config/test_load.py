from __future__ import annotations

import enum
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from mmattn.config import load_config, recipe_of, to_yaml
from mmattn.errors import ConfigError


class Colour(enum.Enum):
    red = 1
    blue = 2


@dataclass
class Training:
    max_steps: int = 5
    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    schedule: Literal["cosine", "constant"] = "cosine"
    micro_batch_size: int | None = None
    output_dir: Path = Path("runs/x")

    def __post_init__(self) -> None:
        if self.max_steps < 1:
            raise ValueError("training.max_steps must be at least 1")


@dataclass(frozen=True)
class Lora:
    rank: int = 3


@dataclass
class Source:
    path: str = "???"
    columns: dict[str, str] = field(default_factory=dict)


@dataclass
class Config:
    name: str = "default"
    colour: Colour = Colour.red
    training: Training = field(default_factory=Training)
    lora: Lora | None = None
    sources: list[Source] = field(default_factory=list)
    words: list[str] = field(default_factory=list)


@pytest.fixture
def write(tmp_path: Path):
    def write_file(text: str) -> Path:
        path = tmp_path / "my.yaml"
        path.write_text(text)
        return path

    return write_file


def test_each_later_source_wins(write):
    path = write("name: file\ntraining: {max_steps: 11, learning_rate: 0.5}\n")
    assert load_config(Config, None) == Config()
    loaded = load_config(Config, path, ["training.max_steps=13", "training.max_steps=17"])
    assert (loaded.name, loaded.training.max_steps, loaded.training.learning_rate) == ("file", 17, 0.5)
    assert loaded.training.betas == (0.9, 0.95)


def test_values_take_the_types_of_the_dataclass():
    overrides = ["training.learning_rate=1e-4", "training.betas=[0.5, 0.25]", "training.output_dir=a/b", "lora.rank=2"]
    loaded = load_config(Config, None, [*overrides, "words=[a, b]", "colour=blue", "training.micro_batch_size=null"])
    assert loaded.training == Training(learning_rate=1e-4, betas=(0.5, 0.25), output_dir=Path("a/b"))
    assert (loaded.lora, loaded.words, loaded.colour) == (Lora(2), ["a", "b"], Colour.blue)


def test_a_value_may_hold_an_equals_sign():
    assert load_config(Config, None, ["name=a=b"]).name == "a=b"


def test_the_recipe_key_is_not_part_of_the_schema(write):
    path = write("recipe: vlm\nname: x\n")
    assert load_config(Config, path).name == "x"
    assert recipe_of(path) == "vlm"


def test_yaml_reads_back_equal(write):
    config = load_config(Config, None, ["lora.rank=2", "sources=[{path: p, columns: {text: t}}]", "colour=blue"])
    path = write(to_yaml(config, recipe="vlm"))
    assert path.read_text().startswith("recipe: vlm\nname: default\n")
    assert load_config(Config, path) == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.lerning_rate=1", "unknown key 'training.lerning_rate'. Did you mean 'training.learning_rate'?"),
        ("train.max_steps=1", "unknown key 'train'. Did you mean 'training'?"),
        ("zzz=1", "unknown key 'zzz'. Known keys: name, colour, training, lora, sources, words"),
        ("lora.rnk=1", "unknown key 'lora.rnk'. Did you mean 'lora.rank'?"),
        ("sources=[{pth: x}]", "unknown key 'sources[0].pth'. Did you mean 'sources[0].path'?"),
        ("training.max_steps=many", "training.max_steps: Value 'many' of type 'str' could not be converted to Integer"),
        (
            "training.schedule=linear",
            "training.schedule: Invalid value 'linear', expected one of ['cosine', 'constant']",
        ),
        ("training.betas=[a, b]", "a value has the wrong type"),
        ("training.learning_rate=", "training.learning_rate: Incompatible value 'None' for field of type 'float'"),
        ("training=3", "'training' is a section, not a value; set its keys, such as training.max_steps"),
        ("training.max_steps=0", "config: training.max_steps must be at least 1"),
        ("name=${nowhere}", "config: name: Interpolation key 'nowhere' not found"),
        ("sources=[{}]", "config: needs a value for sources[0].path"),
        ("name=[a", "override 'name=[a': the value is not valid YAML"),
        ("name=run #2", "override 'name=run #2': in YAML ' #' begins a comment: put quotes inside, as in a='\"b #c\"'"),
        ("words=[take #2]", "in YAML ' #' begins a comment"),
        ("training.max_steps", "must be key.path=value, for example training.max_steps=100"),
        ("=3", "override '=3': must be key.path=value"),
        ("--training.max_steps=3", "a config value is set without dashes: training.max_steps=VALUE"),
    ],
)
def test_a_wrong_override_is_one_clear_line(override: str, message: str):
    with pytest.raises(ConfigError) as caught:
        load_config(Config, None, [override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nme: x", "my.yaml: unknown key 'nme'. Did you mean 'name'?"),
        ("training: {max_steps: 1.5}", "my.yaml: training.max_steps: Value '1.5' of type 'float' could not be"),
        ("training: {max_steps: -3}", "my.yaml: training.max_steps must be at least 1"),
        ("name: [a\nb: c", "my.yaml: not valid YAML: "),
        ("name: a\nname: b", "my.yaml: not valid YAML: "),
        ("- a\n- b", "my.yaml: must hold 'key: value' lines at the top, not a list"),
        ("just words", "my.yaml: "),
    ],
)
def test_a_wrong_file_is_one_clear_line(write, text: str, message: str):
    with pytest.raises(ConfigError) as caught:
        load_config(Config, write(text))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_text(tmp_path: Path):
    path = tmp_path / "my.yaml"
    path.write_bytes(b"\xff\xfe\x00name")
    with pytest.raises(ConfigError, match="my.yaml: not a text file"):
        load_config(Config, path)


def test_an_empty_file_gives_the_defaults(write):
    assert load_config(Config, write("# nothing\n")) == Config()


def test_a_file_without_a_recipe(write):
    with pytest.raises(ConfigError, match="my.yaml: names no recipe; add a line such as 'recipe: vlm' at the top"):
        recipe_of(write("name: x"))


def test_a_saved_config_may_have_settings_that_there_no_longer_are(write):
    path = write("name: mine\ntraining: {max_steps: 7, speed: 3}\nlora: {rank: 5, gone: null}\nold: [1]\n")
    with pytest.raises(ConfigError, match=r"unknown key 'training\.speed'"):
        load_config(Config, path)
    with pytest.warns(UserWarning, match="has a setting that there no longer is, which is left out: ") as said:
        config = load_config(Config, path, ["lora.rank=4"], is_saved=True)
    assert (config.name, config.training.max_steps, config.lora) == ("mine", 7, Lora(4))
    assert [str(one.message).rpartition("out: ")[2] for one in said] == [
        "training.speed, 3",
        "lora.gone, None",
        "old, [1]",
    ]
    with pytest.raises(ConfigError, match="unknown key 'training.speed'"):
        load_config(Config, write("name: mine"), ["training.speed=3"], is_saved=True)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("words=one", r"'words' is a list, not a single value: put it in brackets, such as \[one\]$"),
        ("words={a: 1}", "'words' is a list, not a single value"),
        ("training.betas=0.9", r"'training\.betas' is a list, not a single value"),
        ("training.betas=[0.9]", r"'training\.betas' takes 2 values, not 1$"),
        ("training=", r"'training' is a section, and empty: set its keys, or leave it out$"),
        ("training=[1, 2]", r"'training' is a section, not a value; set its keys, such as training\.max_steps$"),
    ],
)
def test_lists_and_what_is_none(override, message):
    with pytest.raises(ConfigError, match=message):
        load_config(Config, None, [override])
    assert load_config(Config, None, ['name="run #2"']).name == "run #2"
    assert load_config(Config, None, ["name=run#2"]).name == "run#2"
    assert load_config(Config, None, ["words=[one]", "training.betas=[0, 0.5]"]).training.betas == (0, 0.5)
