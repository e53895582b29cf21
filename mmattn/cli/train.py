"""`mmattn train`."""

from __future__ import annotations

from typing import Annotated

import typer

from mmattn.cli.options import ConfigArgument, OverridesArgument


def train(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint.")] = False,
) -> None:
    """Train from a config."""
    from mmattn.cli.recipe_main import train_recipe
    from mmattn.config import load_recipe, recipe_of

    train_recipe(load_recipe(recipe_of(config)), config, overrides or (), resume=resume)
