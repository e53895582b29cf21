"""`mmattn export`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmattn.cli.options import OverridesArgument

if TYPE_CHECKING:
    from mmattn.training import Task


def export(
    source: Annotated[
        Path, typer.Argument(metavar="RUN", help="A run's output_dir, or one of its checkpoints/step-* folders.")
    ],
    target: Annotated[Path, typer.Argument(metavar="FOLDER", help="The new folder for the model.")],
    overrides: OverridesArgument = None,
) -> None:
    """Write a trained model into a folder of its own.

    Of a run it is the best model, else the last. Sharded checkpoints are put together; the values that override the
    run's config, such as where its data lie now, are for those.
    """
    from mmattn.training.export import export_model, exported_part

    part = exported_part(source)
    export_model(part, target, lambda: _task_of(part, overrides or []))
    print(f"{part} written to {target}")


def _task_of(checkpoint: Path, overrides: list[str]) -> Task:
    from mmattn.config import load_config, load_recipe, recipe_of
    from mmattn.errors import ConfigError

    config = checkpoint / "config.yaml"
    if not config.is_file():
        raise ConfigError(
            f"{checkpoint}: sharded, and no recipe wrote it, so that it does not say what model it is of: put it "
            "together in Python, with mmattn.training.export.export_model and the task that was trained"
        )
    recipe = load_recipe(recipe_of(config))
    return recipe.open_task(load_config(recipe.Config, config, overrides, is_saved=True))
