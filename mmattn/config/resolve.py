"""Finds shipped recipes and configs: in a source tree (`recipes/`, `configs/`) or inside the wheel.

A config is named `<recipe>/<name>`, for example `vlm/debug`; a recipe by its file name without the ending.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import itertools
import re
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

from mmattn.errors import ConfigError, RunError

_LAUNCHER = "accelerate"
_PACKAGE = Path(__file__).resolve().parents[1]


def _folder(name: str) -> Path:
    """The shipped folder `name`: `mmattn/_<name>` in a wheel, `<name>/` beside the package in a source tree.

    The wheel's `_recipes` exists in a source tree too (it makes recipes importable), so the source tree is asked first.
    """
    tree = _PACKAGE.parent
    in_tree = tree / name
    if in_tree.is_dir() and (tree / "pyproject.toml").is_file():
        return in_tree
    return _PACKAGE / f"_{name}"


def _shipped(name: str) -> Path:
    return _folder("configs") / f"{name}.yaml"


def nearest(name: str, known: Iterable[str], prefix: str = "") -> str:
    """` Did you mean 'x'?` for the known name closest to `name`, or an empty string; `prefix` stands before both."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" Did you mean {prefix + match[0]!r}?" if match else ""


def list_recipes() -> list[str]:
    """Names of the shipped recipes, sorted."""
    return sorted(path.stem for path in _folder("recipes").glob("*.py") if not path.stem.startswith("_"))


def list_configs() -> list[str]:
    """Names of the shipped configs of recipes, sorted: `<recipe>/<name>`."""
    return [name for name in _all_configs() if not name.startswith(f"{_LAUNCHER}/")]


def list_launcher_configs() -> list[str]:
    """Names of the shipped configs for `accelerate launch --config_file`, sorted: `accelerate/<name>`."""
    return [name for name in _all_configs() if name.startswith(f"{_LAUNCHER}/")]


def _all_configs() -> list[str]:
    return sorted(f"{path.parent.name}/{path.stem}" for path in _folder("configs").glob("*/*.yaml"))


def config_path(source: str | Path) -> Path:
    """The file that `source` means: a YAML file's path, or the name of a shipped config.

    Args:
        source: `my.yaml`, `some/folder/my.yaml`, or a shipped name such as `vlm/debug`.

    Raises:
        ConfigError: neither a file nor a shipped config of a recipe.
    """
    path = Path(source)
    if path.is_file():
        return path
    name = str(source)
    shipped = list_configs()
    if name in shipped:
        return _shipped(name)
    if name in list_launcher_configs():
        raise ConfigError(
            f"{name}: is a config of Accelerate, not of a recipe: `mmattn cp {name} FILE`, then "
            "`accelerate launch --config_file FILE recipes/...`"
        )
    if path.is_dir():
        raise ConfigError(f"{name}: is a folder; give a YAML file, or a shipped config ({', '.join(shipped)})")
    if path.suffix in (".yaml", ".yml"):
        raise ConfigError(f"{name}: no such file. `mmattn cp NAME {name}` makes one from a shipped config")
    raise ConfigError(f"{name}: no such file or shipped config.{nearest(name, shipped)} `mmattn ls` lists them")


def describe_config(source: str | Path) -> str:
    """One line about a config: the first sentence of the comment that opens its file ('' when it has none)."""
    path = _shipped(str(source)) if str(source) in list_launcher_configs() else config_path(source)
    lines = path.read_text(encoding="utf-8").strip().splitlines()
    comment = itertools.takewhile(lambda line: line.startswith("#"), lines)
    text = " ".join(line.lstrip("#").strip() for line in comment)
    return re.split(r"(?<=\.)\s", text, maxsplit=1)[0]


def describe_recipe(name: str) -> str:
    """One line about a recipe: the first line of its docstring, read without importing it."""
    tree = ast.parse((_folder("recipes") / f"{name}.py").read_text(encoding="utf-8"))
    return (ast.get_docstring(tree) or "").partition("\n")[0]


def copy_config(name: str, target: Path) -> Path:
    """Copy the shipped config `name` to `target` (a file, or a folder to put it in) and return the new file.

    Raises:
        ConfigError: no shipped config of that name, the new file exists already, or its folder does not exist.
        RunError: the disk refuses.
    """
    shipped = _all_configs()
    if name not in shipped:
        raise ConfigError(f"{name}: no shipped config.{nearest(name, shipped)} `mmattn ls` lists them")
    source = _shipped(name)
    path = target / source.name if target.is_dir() else target
    if not path.parent.is_dir():
        raise ConfigError(f"{path}: the folder {path.parent} does not exist; make it first")
    is_ours = False
    try:
        with path.open("x", encoding="utf-8") as file:
            is_ours = True
            file.write(source.read_text(encoding="utf-8"))
    except FileExistsError as error:
        raise ConfigError(f"{path}: exists already; nothing was written. Choose another name") from error
    except OSError as error:
        if is_ours:
            path.unlink()
        raise RunError(f"{path}: cannot be written ({error.strerror})") from error
    return path


def trained_config(folder: Path) -> Path:
    """The resolved config that training left beside its checkpoints, the newest one's.

    Args:
        folder: the `output_dir` of a run, or a folder inside it (`best/`, a checkpoint).

    Raises:
        ConfigError: neither the folder nor the three above it belongs to a run.
    """
    for candidate in [folder.resolve(), *folder.resolve().parents][:4]:
        found = [*sorted(candidate.glob("checkpoints/step-*/config.yaml")), *candidate.glob("config.yaml")]
        if found:
            return found[-1]
    raise ConfigError(f"{folder}: no checkpoints with a config.yaml here or above; name its data with --data CONFIG")


def load_recipe(name: str) -> ModuleType:
    """Import the recipe `name` and return its module.

    A recipe offers `Config` (a dataclass), `train(config, *, resume)`, `check(config)` and `evaluate(...)`.

    Raises:
        ConfigError: no recipe of that name.
    """
    known = list_recipes()
    if name not in known:
        raise ConfigError(f"recipe {name!r}: unknown.{nearest(name, known)} Known recipes: {', '.join(known)}")
    return importlib.import_module(f"mmattn._recipes.{name}")
