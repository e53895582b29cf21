"""What the measurements on a card share: options, turns, clocks, the card's two ceilings, and rows written as they
come."""

from __future__ import annotations

import argparse
import atexit
import contextlib
import gc
import json
import math
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from side_by_side import ASK, GIVE_BACK, OUT_OF_TIME, TURN

ROOT = Path(__file__).resolve().parents[2]
for folder in (ROOT, ROOT / "scripts" / "bench"):
    sys.path.insert(0, str(folder))


_BEGIN = time.monotonic()


@dataclass(frozen=True)
class Options:
    """How a part is run; `tiny` only shows that it runs; `only` names one of the jobs of a part that has several, None
    all of them; `turns` are the file descriptors by which it asks for its turn; `resources` asks for what the kernels
    take of a processor, and nothing is measured."""

    device: str
    tiny: bool
    rows: Path | None
    only: str | None = None
    turns: tuple[int, int] | None = None
    resources: bool = False

    @property
    def repeats(self) -> int:
        """Timed runs of each variant."""
        return 1 if self.tiny else 3

    def add(self, table: str, **cells: Any) -> None:
        """Print a row and keep it, at once: what is measured stays when a later row fails."""
        spent = time.monotonic() - _BEGIN
        print(f"{spent:.0f} s, {table}: " + ", ".join(f"{name} {value}" for name, value in cells.items()), flush=True)
        if self.rows is not None:
            with self.rows.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"table": table, "cells": cells}) + "\n")

    @contextlib.contextmanager
    def turn(self) -> Iterator[float]:
        """Inside nothing else runs: other parts of the same check, which import, compile and load beside this one, are
        stopped. Measure in here, and do nothing else. Gives the time of its beginning, by `time.perf_counter`."""
        if self.turns is not None:
            reads, writes = self.turns
            wait(self.device)
            os.write(writes, ASK)
            if not os.read(reads, 1):
                raise SystemExit("the check that this belongs to has ended")
        try:
            yield time.perf_counter()
        finally:
            if self.turns is not None:
                try:
                    wait(self.device)
                finally:
                    os.write(self.turns[1], GIVE_BACK)


def read_options(description: str | None, jobs: Sequence[str] = (), has_resources: bool = False) -> Options:
    """From the command line of a part, whose jobs have these names; `has_resources`: it has kernels of its own, and can
    say what they take."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="sizes that only show that it runs")
    parser.add_argument("--rows", type=Path, metavar="FILE", help="append rows here, as JSON lines")
    if jobs:
        parser.add_argument("--only", choices=jobs, help="this alone")
    if has_resources:
        parser.add_argument(
            "--resources",
            action="store_true",
            help="no card: registers, shared memory, spills of its kernels, compiled for 8.0 and 9.0",
        )
    arguments = parser.parse_args()
    torch.manual_seed(0)
    # Capturing a graph collects garbage: not each time among all that was imported.
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)  # else libraries tell of leaks
    turns = os.environ.get(TURN)
    reads, writes = map(int, turns.split(",")) if turns else (0, 0)
    only = arguments.only if jobs else None
    return Options(
        arguments.device,
        arguments.tiny,
        arguments.rows,
        only,
        (reads, writes) if turns else None,
        has_resources and arguments.resources,
    )


def tell(problem: Exception) -> None:
    """One line of why there is no figure."""
    first = (str(problem).splitlines() or [""])[0]
    print(f"    {type(problem).__name__}: {first[:150]}", flush=True)


@dataclass
class Status:
    """What a part's exit status is made of: it is only well where no row is wanting."""

    has_failed: bool = False
    was_late: bool = False

    def skip(self, what: str) -> None:
        """There is no time for a row."""
        print(f"out of time: {what} not measured", flush=True)
        self.was_late = True

    @contextlib.contextmanager
    def row(self, what: str) -> Iterator[None]:
        """What fails inside is told, and costs the others nothing."""
        try:
            yield
        except Exception:
            traceback.print_exc()
            print(f"failed: {what}", flush=True)
            self.has_failed = True
            if torch.cuda.is_initialized():
                with contextlib.suppress(RuntimeError):  # what failed on the card may fail all that comes after
                    torch.cuda.empty_cache()

    @property
    def code(self) -> int:
        """0, 1 where something has failed, else `OUT_OF_TIME` where something was left out."""
        return 1 if self.has_failed else OUT_OF_TIME if self.was_late else 0


def wait(device: str) -> None:
    """Until the card has done what it was given."""
    if device == "cuda" and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def wall_ms(runs: dict[str, Callable[[], Any]], repeats: int, device: str) -> dict[str, list[float]]:
    """Milliseconds of each run by the wall clock, alternating; each has run once before."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            wait(device)
            begin = time.perf_counter()
            run()
            wait(device)
            times[name].append((time.perf_counter() - begin) * 1000)
    return times


def median_and_spread(times: list[float]) -> tuple[float, float]:
    """The median, and half the distance from best to worst as a part of it."""
    middle = statistics.median(times)
    return middle, (max(times) - min(times)) / 2 / middle


def card_us(calls: list[Callable[[], Any]], device: str) -> tuple[float, bool]:
    """Microseconds that the card works on one call, and whether the calls replayed as one CUDA graph.

    The calls do the same on different inputs, together larger than the cache. Where a call cannot be captured, events
    around the calls count the launches too.
    """
    if device == "cpu":
        return 1000 * wall_ms({"": calls[0]}, 1, device)[""][0], False
    replay, is_graphed = _captured(calls)
    return _event_us({"": replay})[""] / len(calls), is_graphed


def alternating_us(runs: dict[str, list[Callable[[], Any]]], device: str) -> dict[str, float]:
    """`card_us` of each variant, one replay of each after the other: what changes with time, clocks above all, falls on
    all of them alike. Infinite where a variant does not run, or not in a CUDA graph: launches would be counted too."""
    found: dict[str, float] = {}
    replays: dict[str, Callable[[], Any]] = {}
    for name, calls in runs.items():
        try:
            if device == "cpu":
                found[name] = len(calls) * card_us(calls, device)[0]
                continue
            replay, is_graphed = _captured(calls)
        except Exception as error:  # the others' figures are wanted
            print(f"  {name}:", end="")
            tell(error)
            continue
        if is_graphed:
            replays[name] = replay
    found |= _event_us(replays)
    return {name: found[name] / len(calls) if name in found else math.inf for name, calls in runs.items()}


def _captured(calls: list[Callable[[], Any]]) -> tuple[Callable[[], Any], bool]:
    """What does all calls once, and whether that is one CUDA graph; they have run before, by themselves."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in (calls * 3)[: max(3, len(calls))]:
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        # Around it once more: where a capture fails, torch leaves its stream the current one.
        with torch.cuda.stream(side), torch.cuda.graph(graph, stream=side):
            for call in calls:
                call()
        return graph.replay, True
    except Exception as error:
        print("  not captured:", end="")
        tell(error)
        torch.cuda.synchronize()
        _renew_generator()

        def replay() -> None:
            for call in calls:
                call()

        return replay, False


def _renew_generator() -> None:
    """After a capture that failed, torch (2.11) takes the default generator for one that is being captured still, and
    refuses to draw with it."""
    torch.cuda.default_generators[torch.cuda.current_device()].graphsafe_set_state(torch.Generator("cuda"))


def _event_us(replays: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """The median of each, one after the other: five times and more, up to 25 where all of them have not taken 25 ms a
    variant yet."""
    for replay in replays.values():
        replay()
    times: dict[str, list[float]] = {name: [] for name in replays}
    for count in range(25 if replays else 0):
        if count >= 5 and sum(map(sum, times.values())) >= 25_000 * len(replays):
            break
        for name, replay in replays.items():
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            replay()
            end.record()
            end.synchronize()
            times[name].append(1000 * begin.elapsed_time(end))
    return {name: statistics.median(each) for name, each in times.items()}


def host_us(call: Callable[[], Any], count: int, device: str) -> float:
    """Microseconds of the processor for one call, many in a row: the least of three rounds. For calls too small to
    keep the card busy."""
    rounds = []
    for _ in range(3):
        begin = time.perf_counter()
        for _ in range(count):
            call()
        rounds.append((time.perf_counter() - begin) / count * 1e6)
        wait(device)
    return min(rounds)


@dataclass(frozen=True)
class Ceilings:
    """What the card does at most: bytes copied (read and written) and bfloat16 operations, each a second."""

    bytes_per_s: float
    flops_per_s: float

    def floor_us(self, moved: float, flops: float) -> tuple[float, str]:
        """Least time for so many bytes and operations, and which of the two it is."""
        by_bytes, by_flops = 1e6 * moved / self.bytes_per_s, 1e6 * flops / self.flops_per_s
        return max(by_bytes, by_flops), "bytes" if by_bytes >= by_flops else "arithmetic"


def measure_ceilings(options: Options) -> Ceilings:
    """Every number of a large tensor read, negated and written; and a large product of random numbers."""
    size, side = (2**16, 64) if options.tiny else (2**28, 8192)
    source = torch.randn(size, device=options.device)
    target = torch.empty_like(source)
    # By a kernel: a copy inside a graph may go through the copy engine, which is slower.
    copy_us, _ = card_us([lambda: torch.neg(source, out=target)], options.device)
    one, other = (torch.randn(side, side, device=options.device, dtype=torch.bfloat16) for _ in range(2))
    product_us, _ = card_us([lambda: one @ other], options.device)
    return Ceilings(2 * source.nbytes / copy_us * 1e6, 2 * side**3 / product_us * 1e6)
