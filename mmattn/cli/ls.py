"""`mmattn ls`."""

from __future__ import annotations

from mmattn.config.resolve import (
    describe_config,
    describe_recipe,
    list_configs,
    list_launcher_configs,
    list_recipes,
)


def ls() -> None:
    """List the recipes and the shipped configs."""
    recipes = {name: describe_recipe(name) for name in list_recipes()}
    configs = {name: describe_config(name) for name in list_configs()}
    launchers = {name: describe_config(name) for name in list_launcher_configs()}
    width = max((len(name) for name in (*recipes, *configs, *launchers)), default=0)
    groups = {"Recipes": recipes, "Configs": configs, "For accelerate launch --config_file": launchers}
    for title, rows in groups.items():
        if not rows:
            continue
        print(f"{title}:")
        for name, text in rows.items():
            print(f"  {name:<{width}}  {text}".rstrip())
