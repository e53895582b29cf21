"""`mmattn check`."""

from __future__ import annotations

from mmattn.cli.options import ConfigArgument, OverridesArgument


def check(config: ConfigArgument, overrides: OverridesArgument = None) -> None:
    """Check a config and its data without training.

    Prints the data's columns, the number of trainable parameters and an estimate of the memory; needs no GPU.
    """
    from mmattn.config import load_config, load_recipe, recipe_of

    recipe = load_recipe(recipe_of(config))
    for line in recipe.check(load_config(recipe.Config, config, overrides or ())):
        print(line)
