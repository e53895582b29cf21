"""`mmattn show`."""

from __future__ import annotations

from mmattn.cli.options import ConfigArgument, OverridesArgument


def show(config: ConfigArgument, overrides: OverridesArgument = None) -> None:
    """Print a config with every default filled in."""
    from mmattn.config import load_config, load_recipe, recipe_of, to_yaml

    recipe = recipe_of(config)
    print(to_yaml(load_config(load_recipe(recipe).Config, config, overrides or ()), recipe=recipe), end="")
