"""What a launcher asks for, and what of it is refused."""

from __future__ import annotations

import os

import pytest

from mmattn.errors import ConfigError, UsageError
from mmattn.training import devices, train
from mmattn.training.launcher_sharding import fsdp_plugin, resolve_sharding, unchanged_environment, without_deepspeed
from tests.training.layered_toy import LayeredTask
from tests.training.toy import toy_config

FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
ZERO3 = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}
# As `accelerate launch` says what is in `configs/accelerate/zero3-8.yaml`.
SHIPPED = ZERO3 | {
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "none",
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "none",
    "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false",
    "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "false",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1",
    "ACCELERATE_GRADIENT_CLIPPING": "none",
}


@pytest.fixture
def environment(monkeypatch):
    for name in list(os.environ):
        if name.startswith(
            ("FSDP_", "ACCELERATE_USE_", "ACCELERATE_DYNAMO_", "ACCELERATE_DEEPSPEED_", "ACCELERATE_GRADIENT_")
        ):
            monkeypatch.delenv(name)

    def put(values):
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return put


def test_auto_is_what_the_launcher_says(environment):
    wishes = ("auto", "none", "fsdp2", "zero3")
    assert [resolve_sharding(wanted) for wanted in wishes] == ["none", "none", "fsdp2", "zero3"]
    environment(FSDP2)
    assert [resolve_sharding(wanted) for wanted in ("auto", "fsdp2")] == ["fsdp2", "fsdp2"]


@pytest.mark.parametrize("values", [ZERO3, SHIPPED])
def test_auto_is_zero3_where_the_launcher_asks_for_deepspeed(environment, values):
    environment(values)
    assert [resolve_sharding(wanted) for wanted in ("auto", "zero3")] == ["zero3", "zero3"]
    with without_deepspeed():
        assert "ACCELERATE_USE_DEEPSPEED" not in os.environ
    assert os.environ["ACCELERATE_USE_DEEPSPEED"] == "true"


@pytest.mark.parametrize(
    ("values", "wanted", "message"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "auto", r"asks for stage 2 of DeepSpeed's ZeRO: set zero_stage to 3"),
        *[
            (
                {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": "ds.json", **stage},
                "auto",
                message,
            )
            for stage in ({}, {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "None"}, ZERO3)
            for message in (
                r"DeepSpeed settings: deepspeed_config_file is not supported: .* zero_stage to 3, and train",
            )
        ],
        (ZERO3, "none", r"asks for DeepSpeed and training\.sharding is none: launch without it, or say auto"),
        (ZERO3, "fsdp2", r"asks for DeepSpeed and training\.sharding is fsdp2"),
        (FSDP2, "zero3", r"asks for FSDP and training\.sharding is zero3"),
        *[
            (ZERO3 | {f"ACCELERATE_{variable}": value}, "auto", f"DeepSpeed settings: {message}")
            for variable, value, message in (
                ("DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "cpu", "offload_optimizer_device: set it to none"),
                ("DEEPSPEED_OFFLOAD_PARAM_DEVICE", "nvme", "offload_param_device: set it to none"),
                ("DEEPSPEED_ZERO3_INIT", "true", "zero3_init_flag: set it to false, for every process opens the model"),
                ("DEEPSPEED_ZERO3_SAVE_16BIT_MODEL", "true", "zero3_save_16bit_model: set it to false"),
                ("DEEPSPEED_MOE_LAYER_CLS_NAMES", "Block", "deepspeed_moe_layer_cls_names is not supported"),
                ("GRADIENT_CLIPPING", "1.0", r"gradient_clipping: leave it out, and set training\.max_grad_norm"),
                ("GRADIENT_ACCUMULATION_STEPS", "4", r"gradient_accumulation_steps: .* training\.micro_batch_size"),
            )
        ],
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "fsdp2", r"asks for Megatron-LM, .* or DeepSpeed's ZeRO-3 \(zero_sta"),
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


def test_one_process_has_nothing_to_shard(environment, monkeypatch, tmp_path):
    environment({})
    monkeypatch.setattr(devices, "open_deepspeed", lambda device_type: None)  # it need not be installed
    for sharding, checkpoints, message in (
        ("fsdp2", False, r"sharding=fsdp2 needs several processes, and this is one: launch with mmattn train -n"),
        ("zero3", False, r"sharding=zero3 needs several processes, and this is one: launch with mmattn train -n"),
        ("auto", True, r"sharded_checkpoints needs sharding: set training\.sharding=fsdp2"),
    ):
        config = toy_config(tmp_path / "run", sharding=sharding, sharded_checkpoints=checkpoints)
        with pytest.raises(UsageError, match=message):
            train(LayeredTask(), config)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sharding": "fsdp"}, "sharding must be one of auto, none, fsdp2, zero3, not 'fsdp'"),
        ({"sharding": "none", "sharded_checkpoints": True}, "sharded_checkpoints needs sharding fsdp2"),
        (
            {"sharding": "zero3", "sharded_checkpoints": True},
            "sharded_checkpoints are not for sharding zero3",
        ),
        ({"sharding": "zero3", "torch_compile": True}, "torch_compile is not for sharding zero3: use fsdp2"),
        ({"sharding": "zero3", "mixed_precision": "fp16"}, "fp16 is not for sharding zero3: use bf16, or no"),
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
