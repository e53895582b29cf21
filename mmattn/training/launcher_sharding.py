"""What the launcher asks for: sharding by FSDP2 or DeepSpeed's ZeRO-3, and settings of them that this loop takes from
elsewhere or lacks.

Launchers say it in the environment: `accelerate launch` with a config file, or its flags.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager

from accelerate.utils import FullyShardedDataParallelPlugin, parse_flag_from_env

from mmattn._environment import changed_environment
from mmattn.errors import UsageError

_USE_FSDP, _USE_DEEPSPEED = "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"
_OTHER_ENGINES = {
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config",
}
# Flags that are off unless somebody asks for them.
_REFUSED_FLAGS = {
    "FSDP_OFFLOAD_PARAMS": "fsdp_offload_params is not supported: set it to false",
    "FSDP_ACTIVATION_CHECKPOINTING": "fsdp_activation_checkpointing: set it to false, and "
    "training.activation_checkpointing to true, which works without sharding too",
}
_DEEPSPEED_FILE = "ACCELERATE_DEEPSPEED_CONFIG_FILE"
# Settings of DeepSpeed: what is the same as leaving them out, and what to do instead of others.
_DEEPSPEED_SETTINGS = {
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": (("none",), "offload_optimizer_device: set it to none"),
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": (("none",), "offload_param_device: set it to none"),
    "ACCELERATE_DEEPSPEED_ZERO3_INIT": (
        ("false",),
        "zero3_init_flag: set it to false, for every process opens the model",
    ),
    "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": (
        ("false",),
        "zero3_save_16bit_model: set it to false, for checkpoints are the loop's and in float32",
    ),
    "ACCELERATE_DEEPSPEED_MOE_LAYER_CLS_NAMES": ((), "deepspeed_moe_layer_cls_names is not supported: leave it out"),
    "ACCELERATE_GRADIENT_CLIPPING": (
        ("none",),
        "gradient_clipping: leave it out, and set training.max_grad_norm",
    ),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": (
        ("1",),
        "gradient_accumulation_steps: leave it out, and set training.micro_batch_size",
    ),
}


def resolve_sharding(wanted: str) -> str:
    """`auto` is fsdp2 or zero3 where the launcher asks for it, else none.

    Args:
        wanted: `TrainingConfig.sharding`.

    Raises:
        UsageError: for other engines, torch.compile, version 1 of FSDP, other stages of ZeRO, settings of them that
            are not supported, or a launcher that shards otherwise than `wanted`.
    """
    for variable, name in _OTHER_ENGINES.items():
        if parse_flag_from_env(variable):
            raise UsageError(
                f"the launcher asks for {name}, which would take over what the training loop does itself: launch with "
                "FSDP2 (use_fsdp, fsdp_version: 2) or DeepSpeed's ZeRO-3 (zero_stage: 3)"
            )
    compiler = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if compiler.lower() not in ("", "no"):
        raise UsageError(
            f"the launcher asks for dynamo_backend {compiler}, which renames what a checkpoint holds: set it to no"
        )
    asked = {"FSDP": "fsdp2"} if parse_flag_from_env(_USE_FSDP) else {}
    asked |= {"DeepSpeed": "zero3"} if parse_flag_from_env(_USE_DEEPSPEED) else {}
    for name, sharding in asked.items():
        if wanted not in ("auto", sharding):
            raise UsageError(
                f"the launcher asks for {name} and training.sharding is {wanted}: launch without it, or say auto"
            )
        (_check_fsdp if name == "FSDP" else _check_deepspeed)()
    return next(iter(asked.values()), "none" if wanted == "auto" else wanted)


def _check_fsdp() -> None:
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise UsageError("the launcher asks for version 1 of FSDP: set fsdp_version to 2 in its config")
    if os.environ.get("FSDP_AUTO_WRAP_POLICY", "").upper() == "SIZE_BASED_WRAP":
        raise UsageError("fsdp_auto_wrap_policy SIZE_BASED_WRAP is not supported: use TRANSFORMER_BASED_WRAP")
    if os.environ.get("FSDP_IGNORED_MODULES"):
        raise UsageError("fsdp_ignored_modules is not supported: every parameter is sharded, leave it out")
    for variable, text in _REFUSED_FLAGS.items():
        if parse_flag_from_env(variable):
            raise UsageError(text)


def _check_deepspeed() -> None:
    if os.environ.get(_DEEPSPEED_FILE):  # before the stage, which the file says and the launcher then does not
        raise UsageError(
            "the launcher's DeepSpeed settings: deepspeed_config_file is not supported: leave it out, set zero_stage "
            "to 3, and training.* to what is in it"
        )
    stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")  # Accelerate's own default
    if stage != "3":
        raise UsageError(
            f"the launcher asks for stage {stage} of DeepSpeed's ZeRO: set zero_stage to 3 in its config, or use DDP"
        )
    for variable, (same, text) in _DEEPSPEED_SETTINGS.items():
        value = os.environ.get(variable, "").lower()
        if value and value not in same:
            raise UsageError(f"the launcher's DeepSpeed settings: {text}")


def fsdp_plugin() -> FullyShardedDataParallelPlugin:
    """FSDP2 for Accelerate; `fsdp_reshard_after_forward` as the launcher says.

    Every process opens its model by itself, so that `fsdp_cpu_ram_efficient_loading` has nothing to do.
    """
    return FullyShardedDataParallelPlugin(fsdp_version=2, cpu_ram_efficient_loading=False, auto_wrap_policy="no_wrap")


def unchanged_environment() -> AbstractContextManager[None]:
    """Inside, Accelerate may set variables for the plugin that it was given; a later run shall not find them."""
    return changed_environment({name: os.environ.get(name) for name in (_USE_FSDP, "FSDP_CPU_RAM_EFFICIENT_LOADING")})


def without_deepspeed() -> AbstractContextManager[None]:
    """Inside, Accelerate does not see that the launcher asks for DeepSpeed, which the loop sets up by itself."""
    return changed_environment({_USE_DEEPSPEED: None})
