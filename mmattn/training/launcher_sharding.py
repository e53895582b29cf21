"""What the launcher asks for: sharding by FSDP2, and settings of it that this loop takes from elsewhere or lacks.

Launchers say it in the environment: `accelerate launch` with a config file, or its flags.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate.utils import FullyShardedDataParallelPlugin, parse_flag_from_env

from mmattn.errors import UsageError

_USE_FSDP = "ACCELERATE_USE_FSDP"
_OTHER_ENGINES = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config",
}
# Flags that are off unless somebody asks for them.
_REFUSED_FLAGS = {
    "FSDP_OFFLOAD_PARAMS": "fsdp_offload_params is not supported: set it to false",
    "FSDP_ACTIVATION_CHECKPOINTING": "fsdp_activation_checkpointing: set it to false, and "
    "training.activation_checkpointing to true, which works without sharding too",
}


def resolve_sharding(wanted: str) -> str:
    """`auto` is fsdp2 where the launcher shards, else none.

    Args:
        wanted: `TrainingConfig.sharding`.

    Raises:
        UsageError: for DeepSpeed and other engines, torch.compile, version 1 of FSDP, settings of it that are not
            supported, or a launcher that shards where `wanted` is none.
    """
    for variable, name in _OTHER_ENGINES.items():
        if parse_flag_from_env(variable):
            raise UsageError(
                f"the launcher asks for {name}, which would take over what the training loop does itself: launch with "
                "FSDP2 (use_fsdp, fsdp_version: 2), which shards parameters, gradients and optimiser as ZeRO-3 does"
            )
    compiler = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if compiler.lower() not in ("", "no"):
        raise UsageError(
            f"the launcher asks for dynamo_backend {compiler}, which renames what a checkpoint holds: set it to no"
        )
    if not parse_flag_from_env(_USE_FSDP):
        return "fsdp2" if wanted == "fsdp2" else "none"
    if wanted == "none":
        raise UsageError("the launcher asks for FSDP and training.sharding is none: launch without it, or say auto")
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise UsageError("the launcher asks for version 1 of FSDP: set fsdp_version to 2 in its config")
    if os.environ.get("FSDP_AUTO_WRAP_POLICY", "").upper() == "SIZE_BASED_WRAP":
        raise UsageError("fsdp_auto_wrap_policy SIZE_BASED_WRAP is not supported: use TRANSFORMER_BASED_WRAP")
    if os.environ.get("FSDP_IGNORED_MODULES"):
        raise UsageError("fsdp_ignored_modules is not supported: every parameter is sharded, leave it out")
    for variable, text in _REFUSED_FLAGS.items():
        if parse_flag_from_env(variable):
            raise UsageError(text)
    return "fsdp2"


def fsdp_plugin() -> FullyShardedDataParallelPlugin:
    """FSDP2 for Accelerate; `fsdp_reshard_after_forward` as the launcher says.

    Every process opens its model by itself, so that `fsdp_cpu_ram_efficient_loading` has nothing to do.
    """
    return FullyShardedDataParallelPlugin(fsdp_version=2, cpu_ram_efficient_loading=False, auto_wrap_policy="no_wrap")


@contextmanager
def unchanged_environment() -> Iterator[None]:
    """Inside, Accelerate may set variables for the plugin that it was given; a later run shall not find them."""
    names = (_USE_FSDP, "FSDP_CPU_RAM_EFFICIENT_LOADING")
    before: dict[str, Any] = {name: os.environ.get(name) for name in names}
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
