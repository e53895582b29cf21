"""Several processes of one training run on this machine: started, signalled and watched together."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from mmattn.errors import RunError, UsageError
from mmattn.training.devices import PROCESSES_VARIABLE
from mmattn.training.rank_report import is_first, is_launched, read_report

_POLL_S = 0.1
_GRACE_S = 10.0
_FIRST_S = 3.0
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# The context sets handlers for these too.
_OTHER_SIGNALS = tuple(getattr(signal, name) for name in ("SIGHUP", "SIGQUIT") if hasattr(signal, name))


class LaunchedRunError(RunError):
    """One of the processes failed; `exit_code` is the one that it ended with."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def launch(arguments: Sequence[str], num_processes: int, device: str) -> None:
    """Run `python -m mmattn ARGUMENTS` in `num_processes` processes that know of each other, to their end.

    SIGTERM and SIGINT are passed on to all of them. When one fails the others are ended.

    Args:
        arguments: of the command line, without `-n`.
        num_processes: how many.
        device: `training.device` of the config.

    Raises:
        UsageError: there are fewer GPUs than processes.
        LaunchedRunError: a process failed or was stopped; holds the line and the exit code of the first that did.
    """
    on_cpu = device == "cpu" or not torch.accelerator.is_available()
    num_devices = 0 if on_cpu else torch.accelerator.device_count()
    if not on_cpu and num_devices < num_processes:
        raise UsageError(
            f"-n {num_processes} needs as many devices, and this machine has {num_devices}: use -n {num_devices}, or "
            "training.device=cpu"
        )
    with tempfile.TemporaryDirectory(prefix="mmattn-launch-") as folder:
        _Ranks(arguments, num_processes, Path(folder), on_cpu=on_cpu).run()


def watch_launcher() -> None:
    """In a process that `launch` started: when the launcher is gone, stop as on SIGTERM instead of living on."""
    if not is_launched() or os.name != "posix":
        return
    launcher = os.getppid()

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(1)
        if is_first():
            with contextlib.suppress(OSError):  # whoever reads it may have gone with the launcher
                print("mmattn: the launcher has gone: stopping", file=sys.stderr, flush=True)
        else:  # the first one says it and stops them all, so it must not find itself stopped by another
            time.sleep(_FIRST_S)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="watch-launcher", daemon=True).start()


def _threads_per_rank(num_processes: int) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // num_processes)


class _Ranks:
    """The processes, by torch's own multiprocessing of its elastic launcher, and how they ended."""

    def __init__(self, arguments: Sequence[str], num_processes: int, folder: Path, *, on_cpu: bool) -> None:
        from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]
        from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SubprocessContext

        # It announces every signal that it sends; what the user should know is said by `_outcome`.
        logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL + 1)
        self.num_processes = num_processes
        # The processes meet at a port that this one holds: none can be taken between its choice and its use.
        self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.signals: list[int] = []
        self.context = SubprocessContext(
            name="mmattn",
            entrypoint=sys.executable,
            args=dict.fromkeys(range(num_processes), ("-m", "mmattn", *arguments)),
            envs={rank: self._environment(rank, on_cpu) for rank in range(num_processes)},
            logs_specs=DefaultLogsSpecs(log_dir=str(folder)),
        )

    def _environment(self, rank: int, on_cpu: bool) -> dict[str, str]:
        is_chosen = not on_cpu or "OMP_NUM_THREADS" in os.environ
        threads = {} if is_chosen else {"OMP_NUM_THREADS": str(_threads_per_rank(self.num_processes))}
        return {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "GROUP_RANK": "0",
            "WORLD_SIZE": str(self.num_processes),
            "LOCAL_WORLD_SIZE": str(self.num_processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self.store.port),
            "TORCHELASTIC_RUN_ID": "mmattn",
            "TORCHELASTIC_RESTART_COUNT": "0",
            "TORCHELASTIC_USE_AGENT_STORE": str(True),
            PROCESSES_VARIABLE: str(self.num_processes),
            **threads,
        }

    def run(self) -> None:
        """All processes to their end.

        Raises:
            LaunchedRunError: one of them failed or was stopped.
        """
        with self._signals_passed_on():
            try:
                while not (dead := self._dead()) and self._are_running():
                    time.sleep(_POLL_S)
                if dead and self.signals:  # they save and end by themselves; `wait` would send a second signal
                    self._wait_for_all(_GRACE_S)
                result = self.context.wait(0)  # ends the others when one has failed
            finally:
                self.context.close()
        codes = {} if result is None else {rank: failure.exitcode for rank, failure in result.failures.items()}
        if codes:
            raise self._outcome(dead, codes)

    def _are_running(self) -> bool:
        return any(handler.proc.poll() is None for handler in self.context.subprocess_handlers.values())

    def _wait_for_all(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while self._are_running() and time.monotonic() < end:
            time.sleep(_POLL_S)

    @contextlib.contextmanager
    def _signals_passed_on(self) -> Iterator[None]:
        previous: dict[int, Any] = {number: signal.getsignal(number) for number in (*_SIGNALS, *_OTHER_SIGNALS)}
        try:
            # The context's own handlers, which raise wherever this process happens to be, are replaced at once.
            self.context.start()
            for number in _OTHER_SIGNALS:
                signal.signal(number, previous[number])
            for number in _SIGNALS:
                signal.signal(number, self._pass_on)
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self.signals.append(number)
        for handler in self.context.subprocess_handlers.values():
            handler.proc.send_signal(number)

    def _dead(self) -> dict[int, int]:
        codes = {rank: handler.proc.poll() for rank, handler in self.context.subprocess_handlers.items()}
        return {rank: code for rank, code in codes.items() if code}

    def _outcome(self, dead: Mapping[int, int], codes: Mapping[int, int]) -> LaunchedRunError:
        """What to tell.

        The process that was killed by somebody; else the first that failed by itself; else any that has something to
        say; else that the signal ended all of them, and whether there is something to go on with.

        Args:
            dead: exit codes of those that had failed before the others were ended, by rank.
            codes: those of all that failed.
        """
        reports = {rank: report for rank in codes if (report := read_report(self.context.error_files[rank]))}
        silent = {rank: code for rank, code in (dead or codes).items() if rank not in reports}
        for rank, code in silent.items():
            if code < 0 and -code not in self.signals:
                return self._silent_death(rank, code)
        if reports:
            first = min(reports.values(), key=lambda report: (report.is_consequence, report.at))
            return LaunchedRunError(first.message, first.exit_code)
        if self.signals:
            return self._signalled(self.signals[-1])
        return self._silent_death(*next(iter(silent.items())))

    def _signalled(self, number: int) -> LaunchedRunError:
        # The first signal lets a process that trains finish and save its step. A process before that dies of it, and so
        # does one after the last step; of a second signal all do.
        name = signal.Signals(number).name
        if len(self.signals) == 1 and not self._have_met():
            return LaunchedRunError(f"stopped by {name} before the first step", 128 + number)
        text = f"ended at once by {name}; go on with --resume from the last checkpoint"
        return LaunchedRunError(text, 128 + number)

    def _have_met(self) -> bool:
        return self.store.num_keys() > 0

    def _silent_death(self, rank: int, code: int) -> LaunchedRunError:
        what = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        why = " (out of memory?)" if code == -signal.SIGKILL else ""
        return LaunchedRunError(
            f"process {rank} of {self.num_processes} {what}{why}, and the others were ended: go on with --resume", 1
        )
