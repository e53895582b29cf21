"""Every shipped config, against the recipe that it names."""

from __future__ import annotations

import pytest

from mmattn.config import (
    describe_config,
    list_configs,
    list_recipes,
    load_config,
    load_recipe,
    recipe_of,
    to_yaml,
)


@pytest.mark.parametrize("name", list_configs())
def test_a_shipped_config_fits_its_recipe(name: str, tmp_path):
    recipe = recipe_of(name)
    assert name.startswith(f"{recipe}/")
    schema = load_recipe(recipe).Config
    config = load_config(schema, name)
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(to_yaml(config, recipe=recipe))
    assert load_config(schema, resolved) == config


@pytest.mark.parametrize("name", list_configs())
def test_a_shipped_config_says_what_it_is(name: str):
    assert 10 < len(describe_config(name)) <= 110


@pytest.mark.parametrize("recipe", list_recipes())
def test_every_recipe_has_a_debug_config(recipe: str):
    assert f"{recipe}/debug" in list_configs()
