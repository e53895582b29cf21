"""Processes and all that came from them, stopped for a while; and how many may run at once."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Sequence
from pathlib import Path

import psutil

_NOT_RUNNING = (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def freeze(pid: int) -> list[psutil.Process]:
    """Stop a process and its descendants. Those that are stopped by it, for `thaw`: not those that were already."""
    stopped: dict[int, psutil.Process] = {}
    # Again until none is new: one that is not stopped yet may start another.
    while new := [each for each in _tree(pid) if each.pid not in stopped and _is_running(each)]:
        for each in new:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.suspend()
            stopped[each.pid] = each
    return list(stopped.values())


def thaw(stopped: Sequence[psutil.Process]) -> None:
    """Let processes go on; the last first, so that none finds its children standing still."""
    for each in reversed(stopped):
        with contextlib.suppress(psutil.NoSuchProcess):
            each.resume()


def _tree(pid: int) -> list[psutil.Process]:
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _is_running(process: psutil.Process) -> bool:
    try:
        return process.status() not in _NOT_RUNNING
    except psutil.NoSuchProcess:
        return False


def usable_cores() -> int:
    """Processors that this process may use: `os.cpu_count` has all of a machine of which a container may be given a
    few."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        quota, period = _QUOTA.read_text(encoding="utf-8").split()
        cores = min(cores, math.ceil(int(quota) / int(period)))  # "max" is no number: no quota
    return max(1, cores)
