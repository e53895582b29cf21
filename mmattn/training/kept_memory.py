"""Training on a CPU with memory that stays with the process between steps.

glibc gives large blocks back to the system as soon as they are freed, and every step's gradients and activations are
then cleared page by page by the system anew: a fifth of a step of a large U-Net. Kept, they are found again. The most
memory in use is the same within a hundredth, for a step needs what the step before it has freed.
"""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# Of <malloc.h>.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4
_NEVER = 2**31 - 1
# What glibc starts with, and as far as it adapts itself: once told, it no longer does.
_DEFAULTS = {_M_TRIM_THRESHOLD: 64 << 20, _M_MMAP_THRESHOLD: 32 << 20, _M_MMAP_MAX: 65536}
# Somebody who says how memory is allocated means it.
_SETTINGS = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")


@contextmanager
def kept_memory(device: torch.device) -> Iterator[bool]:
    """Inside, freed memory stays with the process; afterwards it goes back. Yields whether that is so.

    It is where training runs on a CPU with glibc, and the environment does not choose or tune an allocator
    (`MALLOC_...`, `GLIBC_TUNABLES`, `LD_PRELOAD`).
    """
    if device.type != "cpu" or platform.libc_ver()[0] != "glibc" or any(map(_is_set, _SETTINGS)):
        yield False
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_MAX, 0)
    libc.mallopt(_M_TRIM_THRESHOLD, _NEVER)
    try:
        yield True
    finally:
        for name, value in _DEFAULTS.items():
            libc.mallopt(name, value)
        libc.malloc_trim(0)


def _is_set(setting: str) -> bool:
    return any(name.startswith(setting) and value for name, value in os.environ.items())
