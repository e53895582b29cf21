"""Cross-attention of U-Nets whose projections of queries and outputs are folded into a prompt's keys and values.

A step is then a product, a softmax over groups of keys, and a product (`folded.py`), instead of a product, attention
and a product: H L / (C + L) times the operations. Beside it: projections and torch's attention, eager and by
torch.compile, and projections with the backend `triton`. Also what folding takes for each prompt, in time and memory,
against 25 steps with guidance. The norm before and the residual after are the same in all, and left out.

On a card bfloat16, microseconds of the card, calls replayed as CUDA graphs over inputs larger than its cache, variants
in turn, medians. With `--device cpu` float32 on as many threads as OMP_NUM_THREADS says, by the clock, batch 2: this
one has no kernel of its own.

    python scripts/gpu/experiments/folded_queries.py [--rows FILE] [--device cpu] [--tiny]

About two minutes on a card, and without one. A verdict for each shape: a gain over what torch.compile makes of the
ordinary form, or none.
"""

from __future__ import annotations

import functools
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import experiment
import torch
from attention import CACHE_BYTES, Shape
from folded import Folded, Projections, attend_folded, attend_projected, fold, unavoidable
from measure import Ceilings, Options, Status, alternating_us, measure_ceilings, median_and_spread, tell, wall_ms
from torch import Tensor

import mmattn

SECONDS = 90  # of its turn, after which no further shape is begun
STEPS = 25
CPU_REPEATS = 25
SHAPES = [shape for shape in experiment.BLOCKS if shape.keys == 77]
TINY = [Shape("tiny", 2, 16, 5, 8)]
STOCK = "projections, sdpa"
FOLDED, FOLDED_COMPILED, PROJECTED = "folded", "folded, compiled", f"projections, {experiment.COMPILED}"
OURS = [FOLDED, FOLDED_COMPILED]
Run = Callable[["Inputs"], Any]


@dataclass(frozen=True)
class Case:
    """A block, its batch, and how many prompts its rows follow: two are those of guidance, for any number of
    pictures."""

    shape: Shape
    batch: int
    prompts: int

    @property
    def where(self) -> str:
        """In a line."""
        return f"{self.shape.name}, batch {self.batch}, {self.prompts} prompts"


def is_by_the_clock(options: Options) -> bool:
    """Is this a measurement on processors?"""
    return options.device == "cpu" and not options.tiny


class Inputs:
    """One layer: its weights, a batch after the norm, keys and values of its prompts, and these with all folded in."""

    def __init__(self, case: Case, options: Options) -> None:
        shape, channels = case.shape, experiment.width(case.shape)
        dtype = torch.float32 if is_by_the_clock(options) else experiment.dtype_of(options)

        def draw(*sizes: int, spread: float = 1.0) -> Tensor:
            return torch.randn(*sizes, device=options.device, dtype=dtype) * spread

        spread = channels**-0.5
        of_query, of_output = (draw(channels, channels, spread=spread) for _ in range(2))
        self.projections = Projections(of_query, of_output, draw(channels))
        self.rows = draw(case.batch, shape.queries, channels)
        kept = (draw(case.prompts, shape.keys, shape.heads, shape.head_dim).transpose(1, 2) for _ in range(2))
        self.key, self.value = kept
        self.each_key, self.each_value = (
            each.repeat_interleave(case.batch // case.prompts, dim=0) for each in (self.key, self.value)
        )
        self.folded = self.fold()

    def fold(self) -> Folded:
        """Once for each prompt."""
        return fold(self.projections, self.key, self.value, self.key.shape[3] ** -0.5)

    @property
    def nbytes(self) -> int:
        """Of a step of either form, the smaller."""
        weights = self.projections.query.nbytes + self.projections.output.nbytes
        return 2 * self.rows.nbytes + min(weights + self.each_key.nbytes + self.each_value.nbytes, self.folded.nbytes)

    def exact(self) -> Tensor:
        """Of the first row, in float64."""
        weights = (self.projections.query, self.projections.output, self.projections.bias)
        doubles = Projections(*(each.double() for each in weights))
        return attend_projected(self.rows[:1].double(), doubles, self.key[:1].double(), self.value[:1].double())


def projected(inputs: Inputs) -> Tensor:
    """As layers do: torch's attention."""
    return attend_projected(inputs.rows, inputs.projections, inputs.each_key, inputs.each_value)


def by_triton(inputs: Inputs) -> Tensor:
    """With our kernel for short keys."""
    attend = functools.partial(mmattn.attention, backend="triton")
    return attend_projected(inputs.rows, inputs.projections, inputs.each_key, inputs.each_value, attend)


def variants(options: Options) -> dict[str, Run]:
    """All that are timed; compiled for each size at its first call."""
    whole = experiment.compiled(attend_projected, options, {})
    product = experiment.compiled(attend_folded, options, {})
    runs: dict[str, Run] = {
        STOCK: projected,
        PROJECTED: lambda inputs: whole(inputs.rows, inputs.projections, inputs.each_key, inputs.each_value),
        "projections, triton": by_triton,
        FOLDED: lambda inputs: attend_folded(inputs.rows, inputs.folded),
        FOLDED_COMPILED: lambda inputs: product(inputs.rows, inputs.folded),
    }
    if is_by_the_clock(options):
        del runs["projections, triton"]  # its interpreter is no measure
    return runs


def able(runs: dict[str, Run], inputs: Inputs) -> dict[str, Run]:
    """Those that run; what is compiled at first calls is compiled here."""
    found = {}
    for name, run in runs.items():
        try:
            with torch.no_grad():
                run(inputs)
            found[name] = run
        except Exception as error:
            print(f"  {name}:", end="")
            tell(error)
    return found


def timed(runs: dict[str, Run], sets: list[Inputs], options: Options) -> dict[str, float]:
    """Microseconds of each variant, one after the other in turn."""
    if is_by_the_clock(options):
        times = wall_ms({name: functools.partial(run, sets[0]) for name, run in runs.items()}, CPU_REPEATS, "cpu")
        spreads = {name: median_and_spread(each) for name, each in times.items()}
        print("  " + ", ".join(f"{name} ±{spread:.0%}" for name, (_, spread) in spreads.items()), flush=True)
        return {name: 1000 * middle for name, (middle, _) in spreads.items()}
    calls = {name: [functools.partial(run, inputs) for inputs in sets] for name, run in runs.items()}
    return alternating_us(calls, options.device)


def checked(inputs: Inputs, runs: dict[str, Run]) -> tuple[dict[str, str], dict[str, float]]:
    """What is wrong with the first row, by the tolerance rule with eager attention, and the largest errors; by name."""
    exact = inputs.exact()
    eager = functools.partial(mmattn.attention, backend="eager")
    one = attend_projected(inputs.rows[:1], inputs.projections, inputs.key[:1], inputs.value[:1], eager)
    results = {name: runs[name](inputs)[:1] for name in (STOCK, *OURS) if name in runs}
    prompt = replace(inputs.folded, key=inputs.folded.key[:1], value=inputs.folded.value[:1])
    rounding = unavoidable(inputs.rows[:1], prompt)
    problems = {name: experiment.wrong(result, one, exact, rounding) for name, result in results.items()}
    errors = {name: (result.double() - exact).abs().max().item() for name, result in results.items()}
    return {name: problem for name, problem in problems.items() if problem}, errors


def floors(case: Case, inputs: Inputs, ceilings: Ceilings) -> dict[str, str]:
    """Of both forms: rows in and out, weights or what is folded, once; and all products."""
    shape, channels, rows = case.shape, experiment.width(case.shape), case.batch * case.shape.queries
    weights, keys = 2.0 * channels**2 * inputs.rows.element_size(), inputs.key.nbytes + inputs.value.nbytes
    ordinary = ceilings.floor_us(
        2 * inputs.rows.nbytes + weights + keys, 4.0 * rows * channels * (channels + shape.keys)
    )
    places = inputs.folded.key.shape[1]
    ours = ceilings.floor_us(2 * inputs.rows.nbytes + inputs.folded.nbytes, 4.0 * rows * channels * places)
    return {"floor, projections": "{:.1f} ({})".format(*ordinary), "floor, folded": "{:.1f} ({})".format(*ours)}


def row_of(case: Case, runs: dict[str, Run], problems: list[str], ceilings: Ceilings | None, options: Options) -> None:
    """A line of the table, and the verdict."""
    sets = sets_of(case, options)
    wrong, errors = checked(sets[0], runs)
    found = [f"{name}: {problem}" for name, problem in wrong.items()]
    problems += [f"{case.where}, {each}" for each in found]
    times = timed({name: run for name, run in runs.items() if name not in wrong}, sets, options)
    folding = timed({"": Inputs.fold}, sets, options)[""]
    best = min((times[name] for name in OURS if name in times), default=math.inf)
    rival = times.get(PROJECTED, math.inf)
    kept = sets[0].key.nbytes + sets[0].value.nbytes
    options.add(
        f"Cross-attention with folded projections, µs{' of processors' if options.device == 'cpu' else ''}",
        shape=case.shape.name,
        sizes=f"{case.shape.queries} x {case.shape.keys}, {case.shape.heads} heads of {case.shape.head_dim}",
        batch=case.batch,
        prompts=case.prompts,
        **{name: f"{us:.1f}" for name, us in times.items()},
        **{f"{experiment.COMPILED} / best folded": f"{rival / best:.2f}"},
        **({} if ceilings is None else floors(case, sets[0], ceilings)),
        **{"folding, once": f"{folding:.1f}"},
        **{f"{STEPS} steps gain": f"{STEPS * (rival - best) - folding:.0f}"},
        **{"KiB a prompt, keys and values": f"{kept / case.prompts / 1024:.0f}"},
        **{"KiB a prompt, folded": f"{sets[0].folded.nbytes / case.prompts / 1024:.0f}"},
        **{f"largest error, {name}": f"{error:.2g}" for name, error in errors.items()},
        values="; ".join(found) or "right",
        verdict=experiment.verdict(case.where, times, OURS, [STOCK, PROJECTED], options.device),
    )


def sets_of(case: Case, options: Options) -> list[Inputs]:
    """Layers, together larger than the cache."""
    first = Inputs(case, options)
    count = 1 if is_by_the_clock(options) else 2
    if options.device == "cuda":
        count = max(count, min(experiment.MOST_SETS, math.ceil(CACHE_BYTES / first.nbytes)))
    return [first, *(Inputs(case, options) for _ in range(count - 1))]


def all_cases(options: Options) -> Iterator[Case]:
    """The smaller batch first: time may run out."""
    for batch in experiment.BATCHES if options.device == "cuda" or options.tiny else experiment.BATCHES[:1]:
        for shape in TINY if options.tiny else SHAPES:
            yield from (Case(shape, batch, prompts) for prompts in sorted({2, batch}))


def main() -> int:
    """Every case; 1 if a value is not what it has to be."""
    options = experiment.start(__doc__)
    problems: list[str] = []
    status = Status()
    runs, ready = variants(options), []
    for case in all_cases(options):
        ready.append((case, able(runs, Inputs(case, options))))
        missing = [name for name in OURS if name not in ready[-1][1]]
        problems += [f"{case.where}, {name}: does not run" for name in missing]
        print(f"  {case.where}: compiled", flush=True)
    with options.turn() as begin, torch.no_grad():
        ceilings = None if is_by_the_clock(options) else measure_ceilings(options)
        for case, usable in ready:
            if time.perf_counter() - begin > SECONDS:
                status.skip(case.where)
                continue
            try:
                row_of(case, usable, problems, ceilings, options)
            except Exception as error:  # other shapes' rows are wanted all the same
                problems.append(f"{case.where}: {type(error).__name__}: {str(error)[:200]}")
    print("\n".join(problems) or "all values right", flush=True)
    return 1 if problems else status.code


if __name__ == "__main__":
    sys.exit(main())
