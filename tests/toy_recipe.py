"""A source tree with one small recipe in it, for tests of the resolver and of the command line."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import mmattn._recipes
from mmattn.config import resolve

RECIPE = '''"""A recipe for tests.

Not the first line.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

from mmattn.errors import DataError, RunError


@dataclass
class Training:
    """How long, and how fast.

    Args:
        max_steps: Steps of the whole run.
    """

    max_steps: int = 7
    learning_rate: float = 1e-3


@dataclass
class Config:
    name: str = "from the defaults"
    failure: str = ""
    output_dir: Path = Path("runs/toy")
    training: Training = field(default_factory=Training)


def train(config, *, resume):
    failures = {
        "run": RunError("training.loss: not finite at step 3; lower learning_rate"),
        "data": DataError("pictures.jsonl: no column 'image'; columns are a, b"),
        "bug": IndexError("list index\\nout of range"),
        "interrupt": KeyboardInterrupt(),
        "exit": SystemExit(0),
    }
    if config.failure:
        raise failures[config.failure]
    if resume:
        print("resumed" if resume is True else f"resumed from {resume}")
    return SimpleNamespace(step=config.training.max_steps, output_dir=config.output_dir)


def check(config):
    return ["config: valid", f"steps: {config.training.max_steps}"]


def evaluate(folder, config):
    return {"accuracy": 0.75, "steps": float(config.training.max_steps)}


if __name__ == "__main__":
    from mmattn.cli.recipe_main import run_recipe

    sys.exit(run_recipe(sys.modules[__name__]))
'''

CONFIG = """# A config for tests
recipe: toy
name: from the file
training:
  max_steps: 11  # not the default
"""


def write_toy_files(recipes: Path, configs: Path) -> None:
    """Write the recipe `toy` and the config `toy/debug` into the two folders."""
    recipes.mkdir(parents=True, exist_ok=True)
    (configs / "toy").mkdir(parents=True)
    (recipes / "toy.py").write_text(RECIPE)
    (configs / "toy" / "debug.yaml").write_text(CONFIG)


@pytest.fixture
def toy_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A source tree that holds only the recipe `toy`; the working directory is an empty folder beside it."""
    tree = tmp_path / "tree"
    write_toy_files(tree / "recipes", tree / "configs")
    (tree / "pyproject.toml").touch()
    (tmp_path / "work").mkdir()
    monkeypatch.setattr(resolve, "_PACKAGE", tree / "mmattn")
    monkeypatch.setattr(mmattn._recipes, "__path__", [str(tree / "recipes")])
    monkeypatch.chdir(tmp_path / "work")
    yield tree
    sys.modules.pop("mmattn._recipes.toy", None)
    vars(mmattn._recipes).pop("toy", None)
