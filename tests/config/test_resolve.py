from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mmattn.config import config_path, describe_config, list_configs, list_recipes, load_recipe
from mmattn.config.resolve import copy_config, describe_recipe, trained_config
from mmattn.errors import ConfigError, RunError
from tests.toy_recipe import CONFIG, write_toy_files

PACKAGE = Path(__file__).resolve().parents[2] / "mmattn"


def test_a_source_tree(toy_tree: Path):
    assert list_recipes() == ["toy"]
    assert list_configs() == ["toy/debug"]
    assert config_path("toy/debug") == toy_tree / "configs" / "toy" / "debug.yaml"
    assert describe_config("toy/debug") == "A config for tests"
    assert describe_recipe("toy") == "A recipe for tests."
    assert load_recipe("toy").Config().training.max_steps == 7


def test_a_wheel_layout(tmp_path: Path):
    """The installed package alone, in a fresh interpreter: everything is found inside it."""
    site = tmp_path / "site"
    for name in ("config", "cli", "_recipes"):
        shutil.copytree(PACKAGE / name, site / "mmattn" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("__init__.py", "__main__.py", "errors.py", "_optional.py"):
        shutil.copy(PACKAGE / name, site / "mmattn" / name)
    write_toy_files(site / "mmattn" / "_recipes", site / "mmattn" / "_configs")

    def run(*arguments: str) -> str:
        environment = {**os.environ, "PYTHONPATH": str(site)}
        command = [sys.executable, "-m", "mmattn", *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert run("ls") == ("Recipes:\n  toy        A recipe for tests.\nConfigs:\n  toy/debug  A config for tests\n")
    shown = run("show", "toy/debug", "--explain", "--only", "training.max_steps")
    assert shown == "training:\n  # Steps of the whole run. [default 7]\n  max_steps: 11\n"
    assert run("train", "toy/debug") == "done: step 11; written to runs/toy\n"


def test_a_file_comes_before_a_shipped_name(toy_tree: Path):
    Path("toy").mkdir()
    Path("toy/debug").write_text("recipe: toy")
    assert config_path("toy/debug") == Path("toy/debug")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("toy/debg", "toy/debg: no such file or shipped config. Did you mean 'toy/debug'? `mmattn ls` lists them"),
        ("my.yaml", "my.yaml: no such file. `mmattn cp NAME my.yaml` makes one from a shipped config"),
        (".", ".: is a folder; give a YAML file, or a shipped config (toy/debug)"),
    ],
)
def test_no_such_config(toy_tree: Path, source: str, message: str):
    with pytest.raises(ConfigError, match=re.escape(message)):
        config_path(source)


def test_no_such_recipe(toy_tree: Path):
    with pytest.raises(ConfigError, match="recipe 'toi': unknown. Did you mean 'toy'\\? Known recipes: toy"):
        load_recipe("toi")


def test_a_launcher_config_is_named_as_such(toy_tree: Path):
    folder = toy_tree / "configs" / "accelerate"
    folder.mkdir()
    (folder / "gpus.yaml").write_text("num_processes: 2")
    message = "accelerate/gpus: is a config of Accelerate, not of a recipe: `mmattn cp accelerate/gpus FILE`, then "
    with pytest.raises(ConfigError, match=re.escape(f"{message}`accelerate launch --config_file FILE recipes/...`")):
        config_path("accelerate/gpus")


@pytest.mark.parametrize(
    ("text", "described"),
    [
        ("# A first\n# sentence of 2.5 lines. A second.\nname: x\n# late", "A first sentence of 2.5 lines."),
        ("\n# No full stop\nname: x", "No full stop"),
        ("# One (two).\n#   a command\n", "One (two)."),
    ],
)
def test_a_config_is_described_by_its_first_sentence(tmp_path: Path, text: str, described: str):
    path = tmp_path / "my.yaml"
    path.write_text(text)
    assert describe_config(path) == described


@pytest.mark.parametrize("text", ["name: x\n# late", "", "\n\nname: x"])
def test_a_config_without_a_description(tmp_path: Path, text: str):
    path = tmp_path / "my.yaml"
    path.write_text(text)
    assert describe_config(path) == ""


def test_copy(toy_tree: Path):
    assert copy_config("toy/debug", Path("my.yaml")) == Path("my.yaml")
    assert Path("my.yaml").read_text() == CONFIG
    assert copy_config("toy/debug", Path()) == Path("debug.yaml")


def test_copy_overwrites_nothing(toy_tree: Path):
    Path("my.yaml").write_text("mine")
    with pytest.raises(ConfigError, match="my.yaml: exists already; nothing was written"):
        copy_config("toy/debug", Path("my.yaml"))
    assert Path("my.yaml").read_text() == "mine"


def test_copy_names_what_is_wrong(toy_tree: Path):
    with pytest.raises(ConfigError, match="toy/dbug: no shipped config. Did you mean 'toy/debug'"):
        copy_config("toy/dbug", Path("my.yaml"))
    with pytest.raises(ConfigError, match="the folder nowhere does not exist"):
        copy_config("toy/debug", Path("nowhere/my.yaml"))
    assert list(Path().iterdir()) == []


def test_a_copy_is_whole_or_not_there(toy_tree: Path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "read_text", full)
    with pytest.raises(RunError, match=r"my.yaml: cannot be written \(No space left on device\)"):
        copy_config("toy/debug", Path("my.yaml"))
    assert list(Path().iterdir()) == []


def test_the_config_of_a_trained_folder(tmp_path: Path):
    run = tmp_path / "run"
    steps = [run / "checkpoints" / f"step-{step:08d}" for step in (3, 11)]
    for folder in (*steps, run / "best"):
        folder.mkdir(parents=True)
    with pytest.raises(ConfigError, match="run: no checkpoints with a config.yaml here or above; name its data with"):
        trained_config(run)
    for step in steps:
        (step / "config.yaml").touch()
    assert trained_config(run) == trained_config(run / "best") == steps[1] / "config.yaml"
    assert trained_config(steps[0]) == steps[0] / "config.yaml"
