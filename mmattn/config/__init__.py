"""Configuration: typed dataclasses filled from YAML files and `key.path=value` overrides."""

from mmattn.config.dump import settings_yaml, to_yaml
from mmattn.config.load import load_config, recipe_of
from mmattn.config.resolve import config_path, describe_config, list_configs, list_recipes, load_recipe
from mmattn.config.settings import part_of, settings_of

__all__ = [
    "config_path",
    "describe_config",
    "list_configs",
    "list_recipes",
    "load_config",
    "load_recipe",
    "part_of",
    "recipe_of",
    "settings_of",
    "settings_yaml",
    "to_yaml",
]
