"""SIGTERM, SIGINT and SIGHUP ask the loop to save and stop after the step at hand."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

from mmattn.errors import RunError


class TrainingStoppedError(RunError):
    """The run was asked to stop, saved, and can be resumed. `exit_code` is 128 + the signal: 143 TERM, 130 INT, 129
    HUP."""

    is_everywhere = True

    def __init__(self, message: str, signal_number: int = signal.SIGTERM) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


class EvaluationInterrupted(BaseException):
    """A stop signal came inside `StopSignal.interrupting`."""


class StopSignal:
    """While open, notes the first of `SIGNALS` instead of dying; a second one acts as usual.

    SIGHUP, by which a terminal that is closed ends what runs in it, is left alone where it is ignored (nohup). Outside
    the main thread Python allows no handlers; then nothing is noted.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, *((signal.SIGHUP,) if hasattr(signal, "SIGHUP") else ()))

    def __init__(self) -> None:
        self.received = 0
        self._interrupts = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            numbers = [number for number in self.SIGNALS if not _is_ignored_hangup(number)]
            self._previous = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    @contextmanager
    def interrupting(self) -> Iterator[None]:
        """Inside, the signal does not only leave a note, for what runs here may take longer than a scheduler waits.

        Raises:
            EvaluationInterrupted: the signal has come, before or inside.
        """
        if self.received:
            raise EvaluationInterrupted
        self._interrupts = True
        try:
            yield
        finally:
            self._interrupts = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self._restore()
        if self._interrupts:
            self._interrupts = False
            raise EvaluationInterrupted

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}


def _is_ignored_hangup(number: signal.Signals) -> bool:
    return number.name == "SIGHUP" and signal.getsignal(number) is signal.SIG_IGN


def ignore_stop_signals(worker: int) -> None:
    """Start of a data worker: schedulers signal the whole process group, and the main process decides when to stop."""
    for number in StopSignal.SIGNALS:
        signal.signal(number, signal.SIG_IGN)
