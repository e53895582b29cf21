"""Training on a CPU with memory that stays with the process between steps.

glibc gives large blocks back to the system as soon as they are freed, and every step's gradients and activations are
then cleared page by page by the system anew: a fifth of a step of a large U-Net. Kept, they are found again, for a step
needs what the step before it has freed. The most memory in use grows by about a hundredth where steps are alike, and by
some more where their sizes vary.
"""

from __future__ import annotations

import ctypes
import os
import platform
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# Of <malloc.h>.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4
_NEVER = -1  # as an unsigned number the largest
# What glibc starts with, and as far as it adapts itself: once told, it no longer does.
_DEFAULTS = {_M_TRIM_THRESHOLD: 64 << 20, _M_MMAP_THRESHOLD: 32 << 20, _M_MMAP_MAX: 65536}
# Somebody who says how memory is allocated means it.
_SETTINGS = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")
_depth = 0


@contextmanager
def kept_memory(device: torch.device) -> Iterator[bool]:
    """Inside, freed memory stays with the process; afterwards it goes back. Yields whether that is so.

    It is where training runs on a CPU with glibc in the main thread (others have memory of another kind), and the
    environment does not choose or tune an allocator (`MALLOC_...`, `GLIBC_TUNABLES`, `LD_PRELOAD`). Of blocks within
    one another the outermost counts. A process forked inside has the setting too: see `stop_keeping_memory`.
    """
    global _depth
    if not _is_possible(device):
        yield False
        return
    libc = ctypes.CDLL(None)
    is_kept = bool(libc.mallopt(_M_MMAP_MAX, 0) and libc.mallopt(_M_TRIM_THRESHOLD, _NEVER))
    _depth += 1
    try:
        yield is_kept
    finally:
        _depth -= 1
        if _depth == 0:
            _restore(libc)


def memory_remarks(device: torch.device) -> list[str]:
    """What the log says where the environment is why memory is not kept."""
    chosen = _chosen() if device.type == "cpu" and _has_glibc() else []
    return [f"freed memory goes back to the system in every step, as {chosen[0]} is set"] if chosen else []


def stop_keeping_memory() -> None:
    """In a process that was forked inside `kept_memory`, data workers for one, whose blocks are of any size: freed
    memory goes back to the system from here on."""
    global _depth
    if _depth:
        _depth = 0
        _restore(ctypes.CDLL(None))


def _is_possible(device: torch.device) -> bool:
    is_main_thread = threading.current_thread() is threading.main_thread()
    return device.type == "cpu" and _has_glibc() and is_main_thread and not _chosen()


def _has_glibc() -> bool:
    return platform.libc_ver()[0] == "glibc"


def _chosen() -> list[str]:
    return sorted(name for name, value in os.environ.items() if name.startswith(_SETTINGS) and value)


def _restore(libc: ctypes.CDLL) -> None:
    for name, value in _DEFAULTS.items():
        libc.mallopt(name, value)
    libc.malloc_trim(0)
