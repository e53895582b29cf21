"""What a run costs: units a second, waiting for data, memory, time left, and how much of a GPU's arithmetic it uses."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch.utils.flop_counter import FlopCounterMode

from mmattn.ops.triton_missing import triton_missing

# bfloat16 and float16 products a second without sparsity, in TFLOP/s, by words of the name that torch gives; the
# first that fits. NVIDIA's data sheets of each card; the GeForce cards with sums in float32.
PEAK_TFLOPS: tuple[tuple[str, float], ...] = (
    ("GB200", 2500.0),
    ("B200", 2250.0),
    ("GH200", 989.4),
    ("H200 NVL", 835.5),
    ("H200", 989.4),
    ("H100 NVL", 835.5),
    ("H100 PCIe", 756.5),
    ("H100", 989.4),
    ("H800", 989.4),
    ("H20", 148.0),
    ("A100", 311.8),
    ("A800", 311.8),
    ("A40", 149.7),
    ("A10G", 70.0),
    ("A10", 125.0),
    ("L40S", 362.1),
    ("L40", 181.1),
    ("L4", 121.0),
    ("RTX 6000 Ada", 364.2),
    ("RTX A6000", 154.8),
    ("RTX 5090", 209.5),
    ("RTX 4090", 165.2),
    ("RTX 4080", 97.5),
    ("RTX 3090", 71.0),
)


def peak_flops(device_name: str) -> float | None:
    """Products and sums in 16 bits that a card can do in a second, or None for a card that is not in the table."""
    if re.search(r"\b(Laptop|MIG|Ti|SUPER)\b", device_name):  # the same names, other chips or a part of one
        return None
    return next((1e12 * value for name, value in PEAK_TFLOPS if re.search(rf"\b{name}\b", device_name)), None)


def peak_memory(device: torch.device) -> int:
    """Most bytes that this process has held: allocated by torch on a GPU, else its resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def _teach_kernels(device: torch.device) -> None:
    """Have torch count the operations of our Triton kernels, where they can run."""
    if triton_missing(device.type) is None:
        # Only here, because it needs triton.
        import mmattn.kernels.flops  # noqa: F401


class Rates:
    """The clock of one piece of a run.

    The share of a GPU's arithmetic (MFU) is by the operations of this piece's first step, counted as it runs, per unit
    (token, picture) that it scored. Operations that are done again for activation checkpointing count too, those inside
    kernels of other packages that torch does not know do not.
    """

    def __init__(self, accelerator: Accelerator, first_step: int, last_step: int) -> None:
        """Start the clock at `first_step`, for a run up to `last_step`."""
        self.accelerator, self.first_step, self.last_step = accelerator, first_step, last_step
        self.started = time.perf_counter()
        self._peak, self.remark = self._find_peak()
        self._flops: float | None = None  # of the step that was counted, then of a unit
        self._flops_per_unit: float | None = None

    def _find_peak(self) -> tuple[float | None, str | None]:
        device, precision = self.accelerator.device, self.accelerator.mixed_precision
        if device.type != "cuda":
            return None, None
        name = torch.cuda.get_device_name(device)
        if precision not in ("bf16", "fp16"):
            return None, f"no MFU is shown: it is for bf16 and fp16, and the precision is {precision}"
        if (peak := peak_flops(name)) is None:
            return None, f"no MFU is shown: the peak of {name} is not known"
        return peak * self.accelerator.num_processes, None

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Around a step: counts the operations of the first one, where they are needed."""
        if self._peak is None or self._flops is not None:
            yield
            return
        _teach_kernels(self.accelerator.device)
        # Compiled layers are not looked into.
        with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
            yield
        self._flops = counter.get_total_flops() * self.accelerator.num_processes

    def clock(self, step: int, count: int, *, data_s: float, step_s: float) -> dict[str, float]:
        """What `metrics.jsonl` has under `time`, after `step`, which scored `count` units in `step_s` seconds."""
        elapsed = time.perf_counter() - self.started
        rate = count / max(step_s, 1e-9)
        figures = {
            "step_s": round(step_s, 6),
            "data_s": round(data_s, 6),
            "tokens_per_s": round(rate, 3),
            "steps_per_s": round((step - self.first_step) / max(elapsed, 1e-9), 6),
            "left_s": round(elapsed / (step - self.first_step) * (self.last_step - step), 1),
            "peak_memory_bytes": peak_memory(self.accelerator.device),
            "at": round(time.time(), 3),
        }
        if self._flops is not None and self._flops_per_unit is None and count:
            self._flops_per_unit = self._flops / count
            return figures  # counting slows the step down
        if self._flops_per_unit is not None and self._peak is not None:
            figures["mfu"] = round(self._flops_per_unit * rate / self._peak, 4)
        return figures
