"""The device, precision and processes of a run, through Accelerate."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import ProjectConfiguration, broadcast_object_list, parse_flag_from_env

from mmattn._optional import require
from mmattn.errors import MmattnError, RunError, UsageError
from mmattn.training.config import TRACKER_FOLDER, TrainingConfig

T = TypeVar("T")
_COLLECTIVE_TIMEOUT = datetime.timedelta(hours=2)  # the main process evaluates and saves while the others wait


def make_accelerator(config: TrainingConfig) -> Accelerator:
    """Accelerate set up for `config`, with every part that the loop does itself switched off.

    Raises:
        UsageError: for a precision that the device lacks, a tracker that is not installed, or processes that were
            launched but do not know of each other.
    """
    for name in config.trackers:
        require(name, f"training.trackers={name}")
    # Accelerate reads this variable only after the processes have been joined, or not.
    cpu = config.device == "cpu" or parse_flag_from_env("ACCELERATE_USE_CPU")
    device = PartialState(cpu=cpu, timeout=_COLLECTIVE_TIMEOUT).device
    precision = resolve_precision(config.mixed_precision, torch.device(device or "cpu"))
    # Accelerate keeps one precision for the life of the process; a second run may want another.
    AcceleratorState._reset_state()
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision=precision,
        log_with=list(config.trackers) or None,
        project_config=ProjectConfiguration(
            config.output_dir, logging_dir=str(Path(config.output_dir) / TRACKER_FOLDER)
        ),
    )
    _check_processes(accelerator)
    return accelerator


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
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != accelerator.num_processes:
        raise UsageError(
            f"{launched} processes were launched, but each would train alone ({accelerator.num_processes} process): "
            "on a CPU set ACCELERATE_USE_CPU=true"
        )
    if accelerator.gradient_accumulation_steps != 1:
        raise UsageError("the loop accumulates by itself: unset gradient_accumulation_steps in the accelerate config")


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
        raise outcome[1]
    return outcome[0]


def sum_over_processes(accelerator: Accelerator, values: list[float]) -> list[float]:
    """Sum each number over the processes, in float64 where the device has it."""
    if accelerator.num_processes == 1:
        return values
    dtype = torch.float32 if accelerator.device.type == "mps" else torch.float64
    tensor = torch.tensor(values, dtype=dtype, device=accelerator.device)
    torch.distributed.all_reduce(tensor)
    return tensor.tolist()
