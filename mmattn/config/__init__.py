"""Configuration: typed dataclasses filled from YAML files and `key.path=value` overrides."""

from mmattn.config.load import load_config, recipe_of, to_yaml
from mmattn.config.resolve import config_path, describe_config, list_configs, list_recipes, load_recipe

__all__ = [
    "config_path",
    "describe_config",
    "list_configs",
    "list_recipes",
    "load_config",
    "load_recipe",
    "recipe_of",
    "to_yaml",
]
