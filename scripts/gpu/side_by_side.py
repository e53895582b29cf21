"""Processes side by side: imports, compilation, models and data of several at once, measurements of one alone.

Nine tenths of what the parts of a check take is no measurement. A process that wants to measure asks for its turn; all
others, with their children, are stopped (SIGSTOP) until it gives the turn back. What they have on the card stays there
and does nothing. `measure.Options.turn` is the other end.
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from processes import freeze, thaw

TURN = "MMATTN_TURN"  # two file descriptors: to be read from, and to be written to
ASK, GIVE_BACK, GRANT = b"+", b"-", b"!"
OUT_OF_TIME = 124  # exit status of a process that ended itself at a time limit of its own; timeout(1) has the same
_POLL_S = 0.05
_SETTLE_S = 0.5  # what a process that was stopped has queued on the card runs to its end
LAST_WORDS_S = 5.0
_LEAST_S = 1.0


@dataclass(frozen=True)
class Job:
    """One process.

    Attributes:
        part: what it belongs to.
        name: which of that part's processes; "" where there is one.
        command: and its arguments.
        environment: variables besides this process's.
        log: a file for what it prints.
        seconds: it may run so long. Waiting for its turn, and being stopped, do not count.
        gib: of the card's memory.
    """

    part: str
    name: str
    command: list[str]
    environment: dict[str, str]
    log: Path
    seconds: float
    gib: float = 0.0


@dataclass(frozen=True)
class Ended:
    """How a job ended.

    Attributes:
        seconds: that it ran.
        error: what was wrong, None when it was all well.
        is_out_of_time: that it has not failed, but was ended or not begun for want of time.
    """

    job: Job
    seconds: float
    error: str | None
    is_out_of_time: bool = False

    @classmethod
    def of(cls, job: Job, seconds: float, code: int | None, turn: float | None = None) -> Ended:
        """By its exit status: None for one that was ended here, for its `turn` if that took too many seconds;
        `OUT_OF_TIME` for one that ended itself in time."""
        if turn is not None and code is None:
            return cls(job, seconds, f"had its turn for {turn:.0f} s, all others waiting", is_out_of_time=True)
        if code is None or code == OUT_OF_TIME:
            return cls(job, seconds, f"not done in {seconds:.0f} s", is_out_of_time=True)
        return cls(job, seconds, f"exit status {code}" if code else None)


@dataclass(eq=False)
class _Active:
    job: Job
    process: subprocess.Popen[bytes]
    reads: int
    writes: int
    spent: float = 0.0
    in_turn: float = 0.0
    asks: bool = False
    is_open: bool = True
    stopped: list[psutil.Process] = field(default_factory=list)


class SideBySide:
    """Runs jobs in their order, several at once.

    Args:
        jobs: the most important first. One that does not fit into the card's memory beside the others is passed over by
            those after it until it does.
        end: by `time.monotonic`; what is not done then is ended.
        at_once: processes at most.
        gib: memory of the card that they may take together. (A job that needs more by itself runs beside none.)
        longest_turn: seconds; one that has its turn for longer is ended: a call that hangs would cost all others
            theirs.
        cwd: where they run.
        on_end: is told of each job, when it ends.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        *,
        end: float,
        at_once: int,
        gib: float,
        cwd: Path,
        on_end: Callable[[Ended], None],
        longest_turn: float = math.inf,
    ) -> None:
        self._queue, self._end, self._at_once, self._gib = list(jobs), end, at_once, gib
        self._cwd, self._on_end, self._longest_turn = cwd, on_end, longest_turn
        self._active: list[_Active] = []
        self._holder: _Active | None = None

    def run(self) -> None:
        """Until all have ended."""
        before = time.monotonic()
        try:
            while self._queue or self._active:
                self._begin()
                self._listen()
                now = time.monotonic()
                for each in self._active:
                    each.spent += now - before if self._may_run(each) else 0.0
                if self._holder is not None:
                    self._holder.in_turn += now - before
                before = now
                self._look(now)
                self._grant()
        finally:
            self._stop(self._active)

    def _may_run(self, each: _Active) -> bool:
        return not each.asks and (self._holder is None or self._holder is each)

    # Beginning.

    def _begin(self) -> None:
        if self._holder is not None:
            return  # it would disturb
        while (job := self._next()) is not None:
            self._queue.remove(job)
            if self._end - time.monotonic() < _LEAST_S:
                self._on_end(Ended(job, 0.0, "not begun: no time was left", is_out_of_time=True))
            else:
                self._active.append(self._started(job))

    def _next(self) -> Job | None:
        """The first in the queue that there is room for."""
        active = [each.job for each in self._active]
        if len(active) >= self._at_once:
            return None
        taken = sum(job.gib for job in active)
        for job in self._queue:
            if not active or taken + job.gib <= self._gib:
                return job
        return None

    def _started(self, job: Job) -> _Active:
        theirs_in, writes = os.pipe()
        reads, theirs_out = os.pipe()
        try:
            with job.log.open("w", encoding="utf-8") as file:
                process = subprocess.Popen(
                    job.command,
                    cwd=self._cwd,
                    env={**os.environ, **job.environment, TURN: f"{theirs_in},{theirs_out}"},
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    pass_fds=(theirs_in, theirs_out),
                )
        finally:
            os.close(theirs_in)
            os.close(theirs_out)
        return _Active(job, process, reads, writes)

    # Turns.

    def _listen(self) -> None:
        by_fd = {each.reads: each for each in self._active if each.is_open}
        if not by_fd:
            time.sleep(_POLL_S)
            return
        for fd in select.select(list(by_fd), [], [], _POLL_S)[0]:
            each, said = by_fd[fd], os.read(fd, 64)
            each.is_open = bool(said)
            for letter in (said[place : place + 1] for place in range(len(said))):
                if letter == ASK:
                    each.asks = True
                elif each is self._holder:
                    self._release()

    def _grant(self) -> None:
        asking = [each for each in self._active if each.asks]
        if self._holder is not None or not asking:
            return
        self._holder = first = asking[0]  # in the order in which they began: the most important
        others = [each for each in self._active if each is not first]
        for each in others:
            each.stopped = freeze(each.process.pid)
        if others:
            time.sleep(_SETTLE_S)
        first.asks, first.in_turn = False, 0.0
        with contextlib.suppress(BrokenPipeError):  # it has ended, which is seen next
            os.write(first.writes, GRANT)

    def _release(self) -> None:
        self._holder = None
        for each in self._active:
            thaw(each.stopped)
            each.stopped = []

    # Ending.

    def _look(self, now: float) -> None:
        """Which have ended, and which have to."""
        is_over = now >= self._end
        late = [each for each in self._active if is_over or each.spent > each.job.seconds or self._has_long_turn(each)]
        ended = [each for each in self._active if each.process.poll() is not None or each in late]
        codes = [each.process.returncode for each in ended]
        self._stop(ended)
        for each, code in zip(ended, codes, strict=True):
            self._active.remove(each)
            turn = each.in_turn if self._has_long_turn(each) else None
            if each is self._holder:
                self._release()
            self._on_end(Ended.of(each.job, each.spent, code, turn))

    def _has_long_turn(self, each: _Active) -> bool:
        return each is self._holder and each.in_turn > self._longest_turn

    def _stop(self, ending: Sequence[_Active]) -> None:
        """An interrupt, on which pytest says what has failed and Python where it was; then the end of all processes."""
        for each in ending:
            thaw(each.stopped)
            if each.process.poll() is None:
                each.process.send_signal(signal.SIGINT)
        last = time.monotonic() + LAST_WORDS_S
        for each in ending:
            with contextlib.suppress(subprocess.TimeoutExpired):
                each.process.wait(timeout=max(0.01, last - time.monotonic()))
            with contextlib.suppress(ProcessLookupError):
                os.killpg(each.process.pid, signal.SIGKILL)
            each.process.wait()
            for fd in (each.reads, each.writes):
                with contextlib.suppress(OSError):
                    os.close(fd)
