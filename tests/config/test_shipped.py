"""Every shipped config, against the recipe that it names."""

from __future__ import annotations

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from mmattn.cli.main import main
from mmattn.config import (
    describe_config,
    list_configs,
    list_recipes,
    load_config,
    load_recipe,
    recipe_of,
    to_yaml,
)
from mmattn.config.resolve import list_launcher_configs


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


@pytest.mark.parametrize("name", list_launcher_configs())
def test_accelerate_reads_its_configs(name: str, tmp_path, capsys):
    assert 10 < len(describe_config(name)) <= 110
    assert main(["cp", name, str(tmp_path / "mine.yaml")]) == 0
    assert f"run `accelerate launch --config_file {tmp_path}/mine.yaml recipes/...`" in capsys.readouterr().out
    config = load_config_from_file(str(tmp_path / "mine.yaml"))
    assert config.num_processes == int(name.rpartition("-")[2]) * (8 if name.startswith("accelerate/nodes") else 1)
    assert config.mixed_precision == ("no" if "cpu" in name else "bf16")
    assert config.fsdp_config.get("fsdp_version") == (2 if "fsdp2" in name else None)
    assert config.deepspeed_config.get("zero_stage") == (3 if "zero3" in name else None)


@pytest.mark.parametrize("recipe", list_recipes())
def test_every_recipe_has_a_debug_config(recipe: str):
    assert f"{recipe}/debug" in list_configs()


@pytest.mark.parametrize("recipe", list_recipes())
def test_a_tilde_is_the_home_folder(recipe: str, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    paths = ["training.output_dir=~/runs/a", "data.kind=files", "data.path=~/train", "data.eval_path=~/eval"]
    config = load_config(load_recipe(recipe).Config, f"{recipe}/debug", paths)
    found = [config.training.output_dir, config.data.path, config.data.eval_path]
    assert found == ["/home/me/runs/a", "/home/me/train", "/home/me/eval"]
    shards = ["data.kind=files", "data.streaming=true", "data.shards=[~/a.jsonl]", "data.index_folder=~/i"]
    data = load_config(load_recipe(recipe).Config, f"{recipe}/debug", shards).data
    assert [*data.shards, data.index_folder] == ["/home/me/a.jsonl", "/home/me/i"]
