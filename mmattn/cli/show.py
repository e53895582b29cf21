"""`mmattn show`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from mmattn.cli.options import ConfigArgument, OverridesArgument
from mmattn.errors import UsageError


def show(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    explain: Annotated[bool, typer.Option("--explain", help="Say above each setting what it means.")] = False,
    only: Annotated[
        str | None, typer.Option("--only", metavar="KEY.PATH", help="Only this setting or section.")
    ] = None,
) -> None:
    """Print a config with every default filled in."""
    from mmattn.config import load_config, load_recipe, part_of, recipe_of, settings_of, settings_yaml, to_yaml

    if explain and sys.flags.optimize > 1:
        raise UsageError("--explain reads docstrings, and python -OO leaves them out: run without -OO (PYTHONOPTIMIZE)")
    recipe = recipe_of(config)
    schema = load_recipe(recipe).Config
    loaded = load_config(schema, config, overrides or ())
    if not explain and only is None:
        print(to_yaml(loaded, recipe=recipe), end="")
        return
    settings = list(settings_of(loaded, load_config(schema, None)))
    if only is None:
        print(settings_yaml(settings, recipe=recipe), end="")
    else:
        print(settings_yaml(part_of(settings, only), explain=explain), end="")
