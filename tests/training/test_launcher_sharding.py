"""What a launcher asks for, and what of it is refused."""

from __future__ import annotations

import os

import pytest

from mmattn.errors import ConfigError, UsageError
from mmattn.training import train
from mmattn.training.launcher_sharding import fsdp_plugin, resolve_sharding, unchanged_environment
from tests.training.layered_toy import LayeredTask
from tests.training.toy import toy_config

FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


@pytest.fixture
def environment(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("FSDP_", "ACCELERATE_USE_", "ACCELERATE_DYNAMO_")):
            monkeypatch.delenv(name)

    def put(values):
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return put


def test_auto_is_what_the_launcher_says(environment):
    assert [resolve_sharding(wanted) for wanted in ("auto", "none", "fsdp2")] == ["none", "none", "fsdp2"]
    environment(FSDP2)
    assert [resolve_sharding(wanted) for wanted in ("auto", "fsdp2")] == ["fsdp2", "fsdp2"]


@pytest.mark.parametrize(
    ("values", "wanted", "message"),
    [
        (
            {"ACCELERATE_USE_DEEPSPEED": "true"},
            "auto",
            r"asks for DeepSpeed, .*: launch with FSDP2 \(use_fsdp, fsdp_ver",
        ),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "fsdp2", "asks for Megatron-LM"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "none", "asks for a parallelism_config"),
        (FSDP2, "none", "the launcher asks for FSDP and training.sharding is none: launch without it, or say auto"),
        ({"ACCELERATE_USE_FSDP": "true"}, "auto", "version 1 of FSDP: set fsdp_version to 2"),
        (FSDP2 | {"FSDP_VERSION": "1"}, "fsdp2", "version 1 of FSDP"),
        (FSDP2 | {"FSDP_OFFLOAD_PARAMS": "true"}, "auto", "fsdp_offload_params is not supported"),
        (FSDP2 | {"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "auto", "training.activation_checkpointing to true"),
        (FSDP2 | {"FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP"}, "auto", "use TRANSFORMER_BASED_WRAP"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "auto", "asks for dynamo_backend INDUCTOR, .*: set it to no"),
        (FSDP2 | {"FSDP_IGNORED_MODULES": "head"}, "auto", "every parameter is sharded, leave it out"),
    ],
)
def test_what_is_refused(environment, values, wanted, message):
    environment(values)
    with pytest.raises(UsageError, match=message):
        resolve_sharding(wanted)


def test_the_plugin_leaves_no_traces(environment):
    environment({})
    with unchanged_environment():
        plugin = fsdp_plugin()
        os.environ["ACCELERATE_USE_FSDP"] = "true"
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert not plugin.cpu_ram_efficient_loading
    assert "ACCELERATE_USE_FSDP" not in os.environ
    assert "FSDP_CPU_RAM_EFFICIENT_LOADING" not in os.environ


def test_one_process_has_nothing_to_shard(environment, tmp_path):
    environment({})
    for sharding, checkpoints, message in (
        ("fsdp2", False, r"sharding=fsdp2 needs several processes, and this is one: launch with mmattn train -n"),
        ("auto", True, r"sharded_checkpoints needs sharding: set training\.sharding=fsdp2"),
    ):
        config = toy_config(tmp_path / "run", sharding=sharding, sharded_checkpoints=checkpoints)
        with pytest.raises(UsageError, match=message):
            train(LayeredTask(), config)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sharding": "fsdp"}, "sharding must be one of auto, none, fsdp2, not 'fsdp'"),
        ({"sharding": "none", "sharded_checkpoints": True}, "sharded_checkpoints needs sharding fsdp2"),
        ({"sharding": "fsdp2", "mixed_precision": "fp16"}, "fp16 is not for sharding fsdp2: use bf16, or no"),
        (
            {"sharding": "fsdp2", "sharded_checkpoints": True, "average_last": 1, "save_every": 5},
            "average_last 1 averages whole checkpoints, and sharded_checkpoints writes none",
        ),
    ],
)
def test_settings_that_do_not_fit(tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        toy_config(tmp_path, **settings).validate()
