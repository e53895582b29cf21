"""What a kernel takes of a processor, without a device: compiled ahead of time, read from the cubin."""

# pyright: reportAttributeAccessIssue=false
from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget

from mmattn.kernels.launch import STAND_IN, Card, Launch

_WARP_SIZE = 32


@dataclass(frozen=True)
class Resources:
    """Attributes: registers a thread, bytes of shared memory a program, bytes spilt a thread (local memory), how many
    warp-group matrix instructions (compute capability 9.0) and older ones there are, and newer ones (10), with the
    columns of tensor memory (512 at most) that these take."""

    registers: int
    shared_bytes: int
    spilled_bytes: int
    warp_group_products: int
    warp_products: int
    tensor_memory_products: int
    tensor_memory_columns: int


class _NoDevice:
    """As much of Triton's driver as compiling asks for."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, _WARP_SIZE)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int | str:
        # Kernels are remembered by device: one for each target.
        return self._target.arch

    def get_current_stream(self, _device: int) -> int:
        return 0


@contextlib.contextmanager
def compiling_for(capability: int, processors: int = 132) -> Iterator[None]:
    """Within the block launches for tensors on a CPU are configured for a card of this compute capability (80, 90,
    100), and `Launch.compile` compiles for it; Triton's driver is out of use in the whole process meanwhile."""
    driver: Any = triton.runtime.driver
    before = driver._active
    token = STAND_IN.set(Card((capability // 10, capability % 10), processors))
    driver.set_active(_NoDevice(capability))
    try:
        yield
    finally:
        driver._active = before
        STAND_IN.reset(token)


def resources_of(launch: Launch) -> Resources:
    """Compile a launch and read what it takes; within `compiling_for`."""
    compiled = launch.compile()
    text = _resource_usage(compiled.asm["cubin"])
    numbers = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    ptx = compiled.asm["ptx"]
    return Resources(
        registers=numbers["REG"],
        shared_bytes=compiled.metadata.shared,
        # Spilt registers lie on the stack; local memory of other kinds is counted with them.
        spilled_bytes=numbers["STACK"] + numbers["LOCAL"],
        warp_group_products=ptx.count("wgmma.mma_async"),
        warp_products=len(re.findall(r"\bmma\.sync", ptx)),
        tensor_memory_products=len(re.findall(r"\btcgen05\.mma\.", ptx)),
        tensor_memory_columns=compiled.metadata.tmem_size,
    )


def _resource_usage(cubin: bytes) -> str:
    """What the CUDA tool that comes with Triton says of a compiled kernel."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(cubin)
        tool = Path(triton.knobs.nvidia.cuobjdump.path)
        done = subprocess.run([tool, "-res-usage", file], capture_output=True, text=True, check=True)
    return done.stdout
