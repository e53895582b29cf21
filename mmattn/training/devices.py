"""The device, precision and processes of a run, through Accelerate."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import ProjectConfiguration, broadcast_object_list, gather_object, parse_flag_from_env

from mmattn._optional import require
from mmattn.errors import MmattnError, RunError, UsageError
from mmattn.training.config import PRECISIONS, TRACKER_FOLDER, TrainingConfig, sharding_problems
from mmattn.training.deepspeed_package import open_deepspeed
from mmattn.training.launcher_sharding import (
    fsdp_plugin,
    resolve_sharding,
    unchanged_environment,
    without_deepspeed,
)

T = TypeVar("T")
PROCESSES_VARIABLE = "MMATTN_PROCESSES"  # how many processes `mmattn train -n` was asked for
_COLLECTIVE_TIMEOUT = datetime.timedelta(hours=2)  # the main process evaluates and saves while the others wait


def make_accelerator(config: TrainingConfig) -> Accelerator:
    """Accelerate set up for `config`, with every part that the loop does itself switched off.

    Raises:
        UsageError: for a precision that the device lacks, a tracker that is not installed, or processes that were
            launched but do not know of each other.
    """
    sharding = resolve_sharding(config.sharding)
    for name in config.trackers:
        require(name, f"training.trackers={name}")
    # Accelerate reads this variable only after the processes have been joined, or not; and without an accelerator it
    # lets processes that were not told to use the CPU run as strangers.
    cpu = config.device == "cpu" or parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    if sharding == "zero3":
        found = None if cpu else torch.accelerator.current_accelerator()
        open_deepspeed("cpu" if found is None else found.type)
    with without_deepspeed():
        joined = PartialState(cpu=cpu, timeout=_COLLECTIVE_TIMEOUT)
    # A run that shards writes FSDP over the way in which the processes have joined, and a later one needs that.
    joined.distributed_type = PartialState._shared_state.setdefault("mmattn_joined_as", joined.distributed_type)
    device = joined.device
    precision = resolve_precision(_asked_precision(config.mixed_precision), torch.device(device or "cpu"))
    # Accelerate keeps one precision for the life of the process; a second run may want another.
    AcceleratorState._reset_state()
    with unchanged_environment(), without_deepspeed():
        accelerator = Accelerator(
            cpu=cpu,
            mixed_precision=precision,
            log_with=list(config.trackers) or None,
            project_config=ProjectConfiguration(
                config.output_dir, logging_dir=str(Path(config.output_dir) / TRACKER_FOLDER)
            ),
            fsdp_plugin=fsdp_plugin() if sharding == "fsdp2" else None,
        )
    _check_processes(accelerator)
    _check_sharding(accelerator, config, sharding)
    return accelerator


def _asked_precision(wanted: str) -> str:
    # `accelerate launch` always says one; its default "no" cannot be told from a wish.
    launcher = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launcher == "no" or launcher == wanted:
        return wanted
    if wanted != "auto":
        raise UsageError(f"the launcher asks for mixed precision {launcher}, training.mixed_precision for {wanted}")
    if launcher not in PRECISIONS:
        raise UsageError(f"the launcher asks for mixed precision {launcher}: use bf16, fp16 or no")
    return launcher


def resolve_precision(wanted: str, device: torch.device) -> str:
    """`auto` is bf16 on a CUDA device with bf16 units and none elsewhere: on a CPU autocast is many times slower.

    Raises:
        UsageError: for fp16 away from CUDA, or bf16 on a CUDA device without it.
    """
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if wanted == "auto":
        return "bf16" if has_bf16 else "no"
    if wanted == "fp16" and device.type != "cuda":
        raise UsageError(f"mixed_precision fp16 needs a CUDA device, this run is on {device.type}: use no")
    if wanted == "bf16" and device.type == "cuda" and not has_bf16:
        raise UsageError("mixed_precision bf16 is not supported by this GPU: use fp16 or no")
    return wanted


def _check_processes(accelerator: Accelerator) -> None:
    # Launchers say how many processes they started only here; Accelerate may, without a word, run them as strangers.
    launched, joined = int(os.environ.get("WORLD_SIZE", "1")), accelerator.num_processes
    if launched != joined:
        raise UsageError(f"{launched} processes were launched, but each would train alone ({joined} process)")
    asked = int(os.environ.get(PROCESSES_VARIABLE) or joined)
    if asked != joined:
        raise UsageError(f"{asked} processes were asked for ({PROCESSES_VARIABLE}), but {joined} have joined this run")
    # `accelerate launch --cpu` sets an address to meet at, and then starts a single process whatever the number.
    if {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"} <= os.environ.keys() and "WORLD_SIZE" not in os.environ:
        raise UsageError(
            "accelerate was asked for several processes and started one, as it does with --cpu: launch with "
            "--multi_gpu (on a CPU too), torchrun, or mmattn train -n"
        )
    if accelerator.gradient_accumulation_steps != 1:
        raise UsageError("the loop accumulates by itself: unset gradient_accumulation_steps in the accelerate config")


def _check_sharding(accelerator: Accelerator, config: TrainingConfig, sharding: str) -> None:
    if sharding == "none":
        if config.sharded_checkpoints:
            raise UsageError("training.sharded_checkpoints needs sharding: set training.sharding=fsdp2, or false")
        return
    if not torch.distributed.is_initialized():
        raise UsageError(
            f"training.sharding={sharding} needs several processes, and this is one: launch with mmattn train -n, "
            "torchrun or accelerate launch, or set training.sharding=none"
        )
    for problem in sharding_problems(config, sharding, accelerator.mixed_precision):
        raise UsageError(problem)
    if sharding == "fsdp2" and accelerator.device.type != "cpu" and not accelerator.is_fsdp2:
        raise UsageError(f"sharding fsdp2 was asked for, but Accelerate set up {accelerator.distributed_type.value}")


def describe_processes(accelerator: Accelerator) -> str:
    """The device and the processes that a run really has, for the log: `cpu, 2 processes (gloo)`."""
    number, kind = accelerator.num_processes, accelerator.device.type
    return kind if number == 1 else f"{kind}, {number} processes ({accelerator.state.backend})"


def on_main(accelerator: Accelerator, function: Callable[[], T]) -> T:
    """Call `function` on the main process; every process gets its result, or its expected failure."""
    if accelerator.num_processes == 1:
        return function()
    outcome: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = function()
        except MmattnError as error:
            outcome[1] = error
        except Exception as error:
            broadcast_object_list([None, RunError(f"the main process failed: {type(error).__name__}: {error}")])
            raise
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        outcome[1].is_everywhere = True
        raise outcome[1]
    return outcome[0]


def on_every(accelerator: Accelerator, function: Callable[[], T]) -> list[T]:
    """Call `function` on every process; each gets all results in order, or the first expected failure."""
    own: tuple[Any, MmattnError | None]
    try:
        own = (function(), None)
    except MmattnError as error:
        own = (None, error)
    outcomes = gather_object([own]) if accelerator.num_processes > 1 else [own]
    for _, error in outcomes:
        if error is not None:
            error.is_everywhere = True
            raise error
    return cast("list[T]", [value for value, _ in outcomes])


def sum_over_processes(accelerator: Accelerator, values: list[float]) -> list[float]:
    """Sum each number over the processes, in float64 where the device has it."""
    if accelerator.num_processes == 1:
        return values
    dtype = torch.float32 if accelerator.device.type == "mps" else torch.float64
    tensor = torch.tensor(values, dtype=dtype, device=accelerator.device)
    torch.distributed.all_reduce(tensor)
    return tensor.tolist()
