"""A card that is not there: kernels are compiled for it (not assembled, which takes longest) and "launched", which only
writes down with what."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from typing import Any
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend

from mmattn.kernels.launch import STAND_IN, Card

Launched = tuple[str, int, tuple[Any, ...]]
DEVICE = 7919
# One list: Triton keeps compiled kernels, and they their launchers.
_LAUNCHED: list[Launched] = []


class _Launcher:
    """Triton's launcher of one compiled kernel."""

    def __init__(self, source: Any, _metadata: Any) -> None:
        self.name = source.fn.__name__

    def __call__(self, x: int, y: int, z: int, stream: int, function: Any, *rest: Any) -> None:
        assert (y, z, stream, function) == (1, 1, 0, f"{self.name} loaded")
        _packed, _metadata, _enter, _exit, *arguments = rest
        _LAUNCHED.append((self.name, x, tuple(arguments)))


class _Tools:
    """What loads a compiled kernel."""

    @staticmethod
    def get_device_properties(_device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 * 1024}

    @staticmethod
    def load_binary(name: str, _binary: bytes, _shared: int, _device: int) -> tuple[Any, str, int, int, int]:
        return object(), f"{name} loaded", 0, 0, 1024

    @staticmethod
    def unload_module(_module: Any) -> None:
        pass


class _Driver:
    """As much of Triton's driver as a launch asks for."""

    utils = _Tools
    launcher_cls = _Launcher

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        # Kernels are remembered by device.
        return DEVICE

    def get_current_stream(self, _device: int) -> int:
        return 0


@contextlib.contextmanager
def faked_card() -> Iterator[list[Launched]]:
    """Within the block kernels are launched on a card that is not there; gives (name, programs, arguments) of each."""
    driver: Any = triton.runtime.driver
    before = driver._active
    _LAUNCHED.clear()
    token = STAND_IN.set(Card((9, 0), 132))
    driver.set_active(_Driver())
    try:
        # What is not assembled must not come into the cache of the machine.
        with tempfile.TemporaryDirectory() as cache, triton.knobs.cache.scope():
            triton.knobs.cache.dir = cache
            with mock.patch.object(CUDABackend, "make_cubin", return_value=b"not assembled"):
                yield _LAUNCHED
    finally:
        driver._active = before
        STAND_IN.reset(token)
