"""What the experiments share: command line, values held to float64, variants timed in turn, and a verdict.

An experiment is a kernel that is not in the package: no card has shown yet that it gains anything over what
torch.compile makes of the same operations. Import this module before triton and before modules of the folder above.
"""

from __future__ import annotations

import functools
import itertools
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

if "cpu" in sys.argv:  # Triton decides when a kernel is defined whether its interpreter runs it
    os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from attention import CACHE_BYTES, SHAPES, Shape
from kernel_resources import head, row
from measure import Ceilings, Options, Status, alternating_us, measure_ceilings, read_options
from processes import usable_cores
from report import machine
from torch import Tensor

from mmattn.kernels.launch import Launch
from mmattn.kernels.resources import compiling_for
from mmattn.ops.tolerance import deviation

BATCHES = (2, 16)
# Of U-Nets and PixArt: a block is given rows of heads * head_dim numbers, one for each query.
BLOCKS = [shape for shape in SHAPES if " cross" in shape.name]
CAPABILITIES = (80, 90)
MOST_SETS = 64
# Of the script's own time: after so many no further call is compiled with every product tuned, and of its turn: after
# so many no further shape is begun.
TUNING_SECONDS, SECONDS = 110, 30
# A smaller lead is not told from noise, and not worth a kernel.
GAIN = 1.05
ONLY_A_CARD = "It measures on a card only; --resources needs none, and --tiny --device cpu shows that it runs"
NO_KERNEL = "It has no kernel of its own: --device cpu measures on processors, with --tiny it shows that it runs"
COMPILED = "torch.compile"
TUNED = {"mode": "max-autotune-no-cudagraphs"}
Run = Callable[[Any], Any]
Case = tuple[Shape, int]
T = TypeVar("T")


def width(shape: Shape) -> int:
    """Of a block's rows."""
    return shape.heads * shape.head_dim


@dataclass(frozen=True)
class Experiment:
    """Variants of one thing.

    Attributes:
        table: its title.
        make: inputs of one call at a shape and batch, on a device, in a dtype; they have `nbytes`.
        stock: the operations in torch, by formula; each is timed as it is and compiled. The first is the definition.
        ours: at a shape, by kind and configuration; the best of each kind is shown, and the best of all judged.
        cost: bytes moved once, and operations, at a shape and batch: the floor.
        exact: the definition in float64, given inputs: a tensor, or some.
        beside: timed for comparison, and not judged.
    """

    table: str
    make: Callable[[Shape, int, str, torch.dtype], Any]
    stock: Mapping[str, Run]
    ours: Callable[[Shape], Mapping[str, Mapping[str, Run]]]
    cost: Callable[[Shape, int], tuple[float, float]]
    exact: Run
    beside: Mapping[str, Run] = field(default_factory=dict)


def start(description: str | None, launches: Callable[[], Iterable[tuple[str, Launch]]] | None = None) -> Options:
    """The command line. Ends the process after a table of what kernels take (`--resources`), and where there is no
    card.

    Args:
        description: the script's docstring.
        launches: called for each compute capability; launches on CPU tensors, and what each is for. None: it has no
            kernel.
    """
    options = read_options(description, has_resources=launches is not None)
    if launches is not None and options.resources:
        print(head("capability", "for"))
        for capability in CAPABILITIES:
            with compiling_for(capability):
                for what, launch in launches():
                    print(row(launch, capability / 10, what), flush=True)
        raise SystemExit(0)
    if options.device == "cuda" and not torch.cuda.is_available():
        print(
            f"{Path(sys.argv[0]).name}: no CUDA card here (torch {torch.__version__} sees none): nothing was measured. "
            f"{ONLY_A_CARD if launches is not None else NO_KERNEL}"
        )
        raise SystemExit(2)
    print("; ".join(f"{name} {value}" for name, value in machine(options.device).items()), flush=True)
    # A function is compiled for every size; beyond 8 torch would refuse.
    torch._dynamo.config.recompile_limit = 256
    torch._dynamo.config.accumulated_recompile_limit = 1024
    return options


def cases(options: Options, tiny: Sequence[Shape], shapes: Sequence[Shape] = BLOCKS) -> list[Case]:
    """Every shape at every batch, the smaller batch first: time may run out."""
    batches, shapes = ((1,), tiny) if options.tiny else (BATCHES, shapes)
    return [(shape, batch) for batch, shape in itertools.product(batches, shapes)]


def dtype_of(options: Options) -> torch.dtype:
    """bfloat16, which Triton's interpreter does not have."""
    return torch.bfloat16 if options.device == "cuda" else torch.float16


@dataclass(frozen=True)
class WithGradients:
    """A `Run` that asks for gradients, which torch.compile does not take: what it compiles is the forward.

    Attributes:
        forward: of one variant.
        run: given that and inputs, what a `Run` gives.
    """

    forward: Callable[..., Any]
    run: Callable[[Callable[..., Any], Any], Any]

    def __call__(self, inputs: Any) -> Any:
        return self.run(self.forward, inputs)


def compiled(function: Callable[..., Any], options: Options, how: Mapping[str, Any]) -> Callable[..., Any]:
    """By torch.compile, for one size each and in one piece; by no compiler where the script is only tried."""
    if isinstance(function, WithGradients):
        return WithGradients(compiled(function.forward, options, how), function.run)
    return torch.compile(function, fullgraph=True, dynamic=False, **({"backend": "eager"} if options.tiny else how))


def compile_side_by_side(compile_one: Callable[[Any], str | None], jobs: Sequence[Any]) -> None:
    """Compile into Triton's cache on disk, in processes of their own; what fails there fails again, and is told, where
    it is run. `compile_one` is a function of the script: it returns what is wrong."""
    begin = time.perf_counter()
    with multiprocessing.get_context("spawn").Pool(max(1, min(len(jobs), usable_cores() - 2))) as pool:
        for problem in pool.imap_unordered(compile_one, jobs):
            if problem:
                print(f"  not compiled: {problem}", flush=True)
    print(f"compiled {len(jobs)} kernels in {time.perf_counter() - begin:.0f} s", flush=True)


def this_card() -> tuple[int, int]:
    """For `compiling_for`."""
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor, torch.cuda.get_device_properties(0).multi_processor_count


def compile_launches(launches: Callable[[], Iterable[tuple[str, Launch]]], options: Options) -> None:
    """Compile what `start` makes its table of, for this card; nothing to do without one."""
    if options.device == "cuda":
        card = this_card()
        with compiling_for(*card):
            count = len(list(launches()))
        compile_side_by_side(functools.partial(_compile_launch, launches, card), range(count))


def _compile_launch(
    launches: Callable[[], Iterable[tuple[str, Launch]]], card: tuple[int, int], number: int
) -> str | None:
    """What is wrong with the launch of that number."""
    with compiling_for(*card):
        what, launch = list(launches())[number]
        try:
            launch.compile()
        except Exception as error:
            return f"{what}: {_said(error)}"
    return None


def _said(error: Exception) -> str:
    """One line of it: Triton shows source first, and says at the end what is wrong."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {(lines or [''])[-1].strip()[:200]}"


def wrong(result: Any, eager: Any, exact: Any, unavoidable: float = 0.0) -> str | None:
    """What is wrong with a result by the tolerance rule of every backend, None if nothing is: a tensor or some, by
    torch's operations in the same dtype, and in float64; `unavoidable`: what rounding of the same terms in another
    order may add."""
    for got, low, reference in zip(*map(_tensors, (result, eager, exact)), strict=True):
        found = deviation(got, low, reference, unavoidable=unavoidable)
        if not found.is_within:
            return f"off by {found.error:.3g}, where {found.bound:.3g} is allowed"
    return None


def _tensors(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


class Prepared:
    """The variants of one case: compiled, and held to float64, before anything is measured."""

    def __init__(self, experiment: Experiment, case: Case, options: Options) -> None:
        self.experiment, self.options = experiment, options
        self.shape, self.batch = case
        self.runs: dict[str, Run] = {}
        self.problems: list[str] = []
        self.kinds = {kind: [f"{kind}, {name}" for name in runs] for kind, runs in experiment.ours(self.shape).items()}
        found: dict[str, Run] = dict(experiment.stock)
        for kind, runs in experiment.ours(self.shape).items():
            found |= {f"{kind}, {name}": run for name, run in runs.items()}
        self._take(found | self._compiled(COMPILED, {}))
        # No variant of the definition: there is nothing to hold them to.
        self.runs |= experiment.beside

    @property
    def where(self) -> str:
        """As a line has it."""
        return f"{self.shape.name}, batch {self.batch}"

    @property
    def is_right(self) -> bool:
        """Do all variants run, and are they right?"""
        return not self.problems

    def make(self) -> Any:
        """Inputs."""
        return self.experiment.make(self.shape, self.batch, self.options.device, dtype_of(self.options))

    def tune(self) -> None:
        """The compiled ones once more, with all that the compiler can try."""
        self._take(self._compiled(f"{COMPILED} {TUNED['mode']}", TUNED))

    def _compiled(self, name: str, how: Mapping[str, Any]) -> dict[str, Run]:
        return {f"{key}, {name}": compiled(run, self.options, how) for key, run in self.experiment.stock.items()}

    def _take(self, runs: Mapping[str, Run]) -> None:
        """Those that run; what is not right is not timed."""
        inputs = self.make()
        exact, eager = self.experiment.exact(inputs), next(iter(self.experiment.stock.values()))(inputs)
        for name, run in runs.items():
            try:
                problem = wrong(run(inputs), eager, exact)
            except Exception as error:
                problem = _said(error)
            if problem is None:
                self.runs[name] = run
            else:
                self.problems.append(f"{name}: {problem}")

    def measure(self, ceilings: Ceilings) -> None:
        """A row of the table, a line of all configurations, and the verdict."""
        first = self.make()
        count = 2 if self.options.tiny else max(2, min(MOST_SETS, math.ceil(CACHE_BYTES / first.nbytes)))
        sets = [first, *(self.make() for _ in range(count - 1))]
        calls = {name: [_call(run, inputs) for inputs in sets] for name, run in self.runs.items()}
        times = alternating_us(calls, self.options.device)
        ours = [name for names in self.kinds.values() for name in names]
        stock = [name for name in times if name not in ours and name not in self.experiment.beside]
        print(
            f"  {self.where}: " + ", ".join(f"{name} {times[name]:.1f}" for name in ours if name in times), flush=True
        )
        cells = {name: _cell(us) for name, us in times.items() if name not in ours}
        for kind, names in self.kinds.items():
            best = min(names, key=lambda name: times.get(name, math.inf))
            cells[kind] = _cell(times.get(best, math.inf), f" ({best.removeprefix(f'{kind}, ')})")
        least, which = ceilings.floor_us(*self.experiment.cost(self.shape, self.batch))
        self.options.add(
            self.experiment.table,
            shape=self.shape.name,
            rows=f"{self.batch * self.shape.queries} x {width(self.shape)}",
            batch=str(self.batch),
            **cells,
            floor=f"{least:.1f} ({which})",
            values="; ".join(self.problems) or "right",
            verdict=verdict(self.where, times, ours, stock, self.options.device),
        )


def _cell(us: float, which: str = "") -> str:
    return f"{us:.1f}{which}" if math.isfinite(us) else "-"


def _call(run: Run, inputs: Any) -> Callable[[], Any]:
    return lambda: run(inputs)


class Measured(Protocol):
    """A case whose variants are ready.

    Attributes:
        where: as a line has it.
        problems: what is not right, or does not run.
        is_right: is nothing among them that the script answers for?
    """

    problems: list[str]

    @property
    def where(self) -> str: ...
    @property
    def is_right(self) -> bool: ...
    def tune(self) -> None: ...
    def measure(self, ceilings: Ceilings) -> None: ...


def run_experiment(experiment: Experiment, wanted: Sequence[Case], options: Options) -> int:
    """All of it; 1 if a variant is not right or does not run, else 0."""

    def make(case: Case) -> Measured:
        return Prepared(experiment, case, options)

    names = [f"{shape.name}, batch {batch}" for shape, batch in wanted]
    return run_cases(list(zip(names, wanted, strict=True)), make, options)


def run_cases(
    wanted: Sequence[tuple[str, T]], make: Callable[[T], Measured], options: Options, seconds: float = SECONDS
) -> int:
    """Prepare every case, tune as many as time allows, and measure them in turn. The exit status: 1 if one is not right
    or fails, else `Status`'s.

    Args:
        wanted: each case with its name.
        make: the case, prepared.
        options: the script's.
        seconds: of its turn, after which no further case is begun.
    """
    begin, prepared, failed, status = time.perf_counter(), list[Measured](), 0, Status()
    for name, each in wanted:
        try:
            prepared.append(make(each))
            print(f"  {name}: {'; '.join(prepared[-1].problems) or 'right'}", flush=True)
        except Exception as error:  # other cases' rows are wanted all the same
            print(f"  {name}: {_said(error)}", flush=True)
            failed += 1
    for each in prepared:
        if time.perf_counter() - begin > TUNING_SECONDS:
            print(f"out of time: {each.where} not compiled by {TUNED['mode']}", flush=True)
            continue
        each.tune()
    with options.turn() as begin:
        ceilings = measure_ceilings(options)
        for each in prepared:
            if time.perf_counter() - begin > seconds:
                status.skip(each.where)
                continue
            try:
                each.measure(ceilings)
            except Exception as error:
                print(f"  {each.where}: {_said(error)}", flush=True)
                failed += 1
    return 1 if failed or not all(each.is_right for each in prepared) else status.code


def verdict(where: str, times: Mapping[str, float], ours: Sequence[str], theirs: Sequence[str], device: str) -> str:
    """Whether the best of our variants gains over the best of torch's: a cell, and a line of its own.

    Args:
        where: the shape and batch.
        times: microseconds of every variant by its name, infinite where there is no figure.
        ours: names of our variants.
        theirs: names of torch's; those that torch.compile made say so, and without them there is no verdict.
        device: "cuda", or what was only tried.
    """

    def best_of(names: Sequence[str]) -> str | None:
        found = {name: times[name] for name in names if math.isfinite(times.get(name, math.inf))}
        return min(found, key=lambda name: found[name], default=None)

    best, rival = best_of(ours), best_of(theirs)
    if device != "cuda":
        said = "none: not a card"
    elif best is None or rival is None or best_of([name for name in theirs if COMPILED in name]) is None:
        said = f"none: no figure of {'ours' if best is None else COMPILED}"
    else:
        ratio = times[rival] / times[best]
        said = f"{'GAIN' if ratio >= GAIN else 'no gain'} over torch.compile: {ratio:.2f} ({rival} / {best})"
    print(f"verdict, {where}: {said}", flush=True)
    return said
