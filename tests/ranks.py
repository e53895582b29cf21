"""Processes of one run, forked from a server that has already loaded what they need: a start costs milliseconds.

A launcher only starts processes and tells them of each other. `tests/cli/test_train_launch.py` has the real ones; what
processes do together is tested here. Nothing ends a process because another has failed.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

_FORKSERVER = multiprocessing.get_context("forkserver")
_FORKSERVER.set_forkserver_preload(["tests.preloaded"])


@dataclass
class Ended:
    """What a process has written, and its exit code, negative when killed."""

    out: str
    err: str
    code: int


class Ranks:
    """`function(*arguments)` in each of `processes` processes that know of each other, or in one that is alone."""

    def __init__(
        self, folder: Path, function: Callable[..., Any], *arguments: Any, processes: int, **environment: str
    ) -> None:
        # The processes meet at a port that this one holds.
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if processes > 1 else None
        folder.mkdir(parents=True, exist_ok=True)
        self._files, self.processes = [], []
        for rank in range(processes):
            files = tuple(folder / f"rank-{rank}-{time.monotonic_ns()}.{name}" for name in ("out", "err"))
            own = {**environment, **self._told(rank, processes)}
            process = _FORKSERVER.Process(target=_run, args=(function, arguments, own, *map(str, files)))
            process.start()
            self._files.append(files)
            self.processes.append(process)
        weakref.finalize(self, _kill, self.processes)  # of a test that fails before their end

    def _told(self, rank: int, processes: int) -> dict[str, str]:
        if self._store is None:
            return {}
        return {
            **{"RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0"},
            **{"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)},
            **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self._store.port)},
            **{"TORCHELASTIC_RUN_ID": "test", "TORCHELASTIC_RESTART_COUNT": "0"},
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }

    def are_running(self) -> bool:
        return all(process.is_alive() for process in self.processes)

    def send_signal(self, rank: int, number: int) -> None:
        os.kill(self.processes[rank].pid, number)

    def end(self, timeout_s: float = 120) -> list[Ended]:
        """Wait for all of them; kill what is left after `timeout_s`, which is an error."""
        until = time.monotonic() + timeout_s
        for process in self.processes:
            process.join(max(0.0, until - time.monotonic()))
        late = [rank for rank, process in enumerate(self.processes) if process.is_alive()]
        for rank in late:
            self.send_signal(rank, signal.SIGKILL)
        ended = [
            Ended(out.read_text(), err.read_text(), process.exitcode)
            for (out, err), process in zip(self._files, self.processes, strict=True)
        ]
        assert not late, f"ranks {late} hang: {[one.err[-2000:] for one in ended]}"
        return ended


def _kill(processes: list[Any]) -> None:
    for process in processes:
        process.kill()


def _run(function: Callable[..., Any], arguments: tuple[Any, ...], environment: dict[str, str], *files: str) -> None:
    for descriptor, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    os.environ.update(environment)
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # of data workers: the default in a process of a launcher
    function(*arguments)
