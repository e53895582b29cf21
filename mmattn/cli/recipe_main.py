"""What a recipe runs under `if __name__ == "__main__"`, and what the verbs share with it.

accelerate launch recipes/vlm.py --config my.yaml [--resume | --resume-from FOLDER] [key.path=value ...]
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import typer

from mmattn.cli.guard import run_guarded, split_debug
from mmattn.cli.options import OVERRIDES_CONTEXT, OverridesArgument, ResumeFromOption, ResumeOption
from mmattn.config import load_config, load_recipe, recipe_of
from mmattn.config.resolve import trained_config
from mmattn.errors import ConfigError, UsageError


def run_recipe(module: ModuleType, argv: Sequence[str] | None = None) -> int:
    """Train as `mmattn train` does, from a recipe that was launched as a script; returns the exit code.

    Args:
        module: the recipe: `sys.modules[__name__]`.
        argv: arguments without the program's name; None reads `sys.argv`.
    """
    name = Path(module.__file__ or "recipe").stem
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)

    @app.command(context_settings=OVERRIDES_CONTEXT)
    def train(
        config: Annotated[str, typer.Option("--config", "-c", help="A YAML file, or a shipped name (`mmattn ls`).")],
        overrides: OverridesArgument = None,
        resume: ResumeOption = False,
        resume_from: ResumeFromOption = None,
    ) -> None:
        """Train this recipe from a config."""
        named = recipe_of(config)
        if named != name:
            raise ConfigError(f"{config}: is for the recipe {named!r}, but this is {name!r}: launch recipes/{named}.py")
        train_recipe(module, config, overrides or (), resume=starting_point(resume, resume_from))

    arguments, debug = split_debug(sys.argv[1:] if argv is None else argv)
    return run_guarded(lambda: app(arguments, prog_name=f"{name}.py"), debug=debug)


def starting_point(resume: bool, resume_from: Path | None) -> bool | str:
    """What a recipe's `resume` is, of the two options that say it.

    Raises:
        UsageError: both are given.
    """
    if resume and resume_from is not None:
        raise UsageError(
            f"--resume goes on in output_dir, --resume-from {resume_from} starts from there in a new one: give one of "
            "them"
        )
    return resume if resume_from is None else str(resume_from)


def train_recipe(module: ModuleType, source: str, overrides: Sequence[str], *, resume: bool | str) -> None:
    """Load the recipe's config, train, and say where the result is (first process only)."""
    if "RANK" in os.environ:
        from mmattn.training.launch import watch_launcher

        watch_launcher()
    config = load_config(module.Config, source, overrides)
    result = module.train(config, resume=resume)
    if os.environ.get("RANK", "0") == "0":
        print(f"done: step {result.step}; written to {result.output_dir}")


def evaluate_folder(
    folder: Path, data: str | None, overrides: Sequence[str], hypotheses: Path | None = None
) -> dict[str, Any]:
    """Scores of a trained folder, on the data that it was trained for or on those of the config `data`.

    Args:
        folder: the `output_dir` of a run, or a folder inside it.
        data: a config; None: the one beside the model.
        overrides: `key.path=value` strings.
        hypotheses: a file for what the model says, beside what is right.

    Raises:
        UsageError: no such folder, or a recipe that writes no hypotheses.
        ConfigError: a folder that does not say which recipe made it.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder; give the output_dir of a training run")
    source = data if data is not None else str(trained_config(folder))
    name = recipe_of(source)
    recipe = load_recipe(name)
    config = load_config(recipe.Config, source, overrides, is_saved=data is None)
    if hypotheses is None:
        return recipe.evaluate(folder, config)
    if "hypotheses" not in inspect.signature(recipe.evaluate).parameters:
        raise UsageError(f"--output {hypotheses}: the recipe {name!r} writes no hypotheses, leave it out")
    return recipe.evaluate(folder, config, hypotheses=hypotheses)
