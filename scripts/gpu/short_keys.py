"""Short-key cross-attention on a card: the backend `triton` beside torch's kernels, with and without a key mask, and
what a call of it costs the processor.

Shapes of U-Nets and PixArt in their own layout [B, L, H, D], bfloat16; microseconds of the card, calls replayed as one
CUDA graph over inputs larger than its cache, medians; "eager" are calls one after another, card and processor together.
Kernels are compiled first, in processes side by side.

    python scripts/gpu/short_keys.py [--device cpu] [--rows FILE] [--tiny]        about 60 seconds on an H100
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

if "cpu" in sys.argv:  # Triton decides when a kernel is defined whether its interpreter runs it
    os.environ["TRITON_INTERPRET"] = "1"

import attention as pinned_attention
import torch
from attention import CACHE_BYTES, PASSES, PINNED, SHAPES, Attend, Shape, floor, measured, ours, pinned, stock
from measure import Ceilings, Options, Status, host_us, measure_ceilings, read_options, tell, wait
from processes import usable_cores
from torch import Tensor

from mmattn.kernels.launch import Launch
from mmattn.kernels.resources import compiling_for
from mmattn.kernels.short_keys import MAX_KEYS, attend, short_key_attention
from mmattn.kernels.short_keys_backward import backward_launches
from mmattn.kernels.short_keys_forward import forward_launch
from mmattn.ops.registry import explain
from mmattn.ops.replay import replayed

SECONDS = 75  # of its turn, after which no further shape is begun
BATCHES = (2, 4, 16)
UNMASKED = [
    replace(shape, name=shape.name.removesuffix(", text mask"), real=None) for shape in SHAPES if shape.keys <= MAX_KEYS
]
MASKED = [
    *(shape for shape in SHAPES if shape.keys <= MAX_KEYS and shape.real is not None),
    replace(UNMASKED[0], name="SD 1.5 cross, 64 x 64, text mask", real=77),
    replace(UNMASKED[3], name="SDXL cross, 64 x 64, text mask", real=77),
]
SMALL = Shape("too small to keep the card busy", 8, 16, 77, 64, real=77)
TINY = [Shape("tiny", 1, 5, 3, 8)]
TINY_MASKED = [Shape("tiny, text mask", 1, 5, 7, 8, real=6)]
RATIO = "best of torch / ours"


def in_order() -> list[tuple[Shape, int]]:
    """Every shape at every batch, what is wanted most first: time may run out."""
    long = [shape for shape in (*UNMASKED, *MASKED) if shape.keys > 77]
    short = [shape for shape in (*UNMASKED, *MASKED) if shape.keys <= 77]
    least, middle, most = BATCHES
    large = [shape for shape in short if shape.name.startswith("SD 1.5 cross, 64 x 64")]
    groups = (
        (short, least),
        (large, most),
        (short, middle),
        (long, least),
        (short, most),
        (long, middle),
        (long, most),
    )
    return list(dict.fromkeys((shape, batch) for shapes, batch in groups for shape in shapes))


class Inputs(pinned_attention.Inputs):
    """In the layout of U-Nets, and half precision that the interpreter knows."""

    def __init__(self, shape: Shape, batch: int, device: str) -> None:
        super().__init__(shape, batch, device)
        tensors = (*self.tensors, self.cotangent)
        if device == "cpu":
            tensors = [tensor.half() for tensor in tensors]
        self.query, self.key, self.value, self.cotangent = (
            tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in tensors
        )


Job = tuple[Shape, int, int, int]


def job_launches(job: Job) -> tuple[Launch, ...]:
    """All that a shape and batch launches; within `compiling_for`."""
    shape, batch = job[:2]

    def draw(length: int) -> Tensor:
        return torch.empty(batch, length, shape.heads, shape.head_dim, dtype=torch.bfloat16).transpose(1, 2)

    query, key, value = draw(shape.queries), draw(shape.keys), draw(shape.keys)
    mask = None if shape.real is None else torch.empty(batch, 1, shape.keys, dtype=torch.bool)
    lse = torch.empty(batch, shape.heads, shape.queries)
    scale = shape.head_dim**-0.5
    forward = forward_launch(query, key, value, mask, None, scale, query, lse)
    return forward, *backward_launches(query, query, key, value, query, lse, mask, None, scale).launches


def is_new(job: Job, seen: set[Any]) -> bool:
    """Is any of its launches compiled differently from all before? (Tensors and numbers in them do not count.)"""
    before = len(seen)
    with compiling_for(*job[2:]):
        launches = job_launches(job)
    for launch in launches:
        constants = {name: value for name, value in launch.arguments.items() if name.isupper()}
        seen.add((launch.kernel.__name__, job[0].head_dim, job[0].heads, launch.num_warps, *constants.items()))
    return len(seen) > before


def compile_job(job: Job) -> str | None:
    """Compile into Triton's cache on disk; the error if it cannot be."""
    try:
        with compiling_for(*job[2:]):
            for launch in job_launches(job):
                launch.compile()
    except Exception as error:
        return f"{job[0].name}, batch {job[1]}: {type(error).__name__}: {str(error)[:200]}"
    return None


def compile_all() -> None:
    """Compile all that will be timed, in processes of their own. What fails here fails again, and is told, below."""
    begin = time.perf_counter()
    major, minor = torch.cuda.get_device_capability()
    card = (10 * major + minor, torch.cuda.get_device_properties(0).multi_processor_count)
    seen: set[Any] = set()
    jobs = [
        job
        for batch, shape in itertools.product(BATCHES, (*MASKED, *UNMASKED, SMALL, replace(SMALL, real=None)))
        if is_new(job := (shape, batch, *card), seen)
    ]
    # Importing takes each of them as long as several kernels, beside all that the other parts import and compile.
    with multiprocessing.get_context("spawn").Pool(min(len(jobs), 6, max(1, usable_cores() - 2))) as pool:
        for problem in pool.imap_unordered(compile_job, jobs):
            if problem:
                print(f"  not compiled: {problem}", flush=True)
    print(f"compiled {len(seen)} kernels in {time.perf_counter() - begin:.0f} s", flush=True)


def input_sets(shape: Shape, batch: int, options: Options) -> list[Inputs]:
    """Together larger than the cache."""
    first = Inputs(shape, batch, options.device)
    count = 2 if options.tiny else max(2, min(24, math.ceil(CACHE_BYTES / first.nbytes)))
    return [first, *(Inputs(shape, batch, options.device) for _ in range(count - 1))]


def eager(attend_to: Attend, sets: list[Inputs], has_gradients: bool, options: Options) -> str:
    """Calls one after another, as a model without a graph makes them: microseconds each."""
    count = 1 if options.tiny else 200

    def once(place: int) -> object:
        inputs = sets[place % len(sets)]
        output = attend_to(inputs)
        return torch.autograd.grad(output, inputs.tensors, inputs.cotangent) if has_gradients else output

    try:
        once(0)
        wait(options.device)
        begin = time.perf_counter()
        for place in range(count):
            once(place)
        wait(options.device)
    except Exception as error:
        tell(error)
        return "-"
    return f"{(time.perf_counter() - begin) / count * 1e6:.1f}"


def ratio(cells: list[str], us: str) -> str:
    """The least of some cells over another; a dash where one of the two is no number."""
    numbers = [float(cell) for cell in cells if cell.replace(".", "", 1).isdigit()]
    return f"{min(numbers) / float(us):.2f}" if numbers and us.replace(".", "", 1).isdigit() else "-"


def measure_shape(shape: Shape, batch: int, ceilings: Ceilings, options: Options) -> None:
    """A row for the forward and one for forward with backward."""
    sets = input_sets(shape, batch, options)
    is_masked = shape.real is not None
    theirs = {
        name: pinned(PINNED[name]) for name in ("cuDNN", "flash", "efficient") if not (is_masked and name == "flash")
    }
    for has_gradients in (False, True):
        cells = {name: measured(run, sets, has_gradients, options.device) for name, run in theirs.items()}
        # With a mask its gradients may be NaN (pytorch issue 196678): shown, but nothing to be measured by.
        right = [cell for name, cell in cells.items() if not (is_masked and has_gradients and name == "cuDNN")]
        if is_masked:
            cells["mmattn sdpa"] = measured(ours("sdpa"), sets, has_gradients, options.device)
        us = measured(ours("triton"), sets, has_gradients, options.device)
        # `measured` has left the inputs with gradients, or without.
        calls = {"eager, mmattn sdpa": ours("sdpa"), "eager, ours": ours("triton")}
        one_after_another = {name: eager(run, sets, has_gradients, options) for name, run in calls.items()}
        took = auto_took(sets[0])
        options.add(
            "Short keys under a key mask, µs" if is_masked else "Short-key attention, µs",
            shape=shape.name,
            sizes=f"{shape.queries} x {shape.keys}, {shape.heads} heads of {shape.head_dim}",
            batch=batch,
            **{"pass": PASSES[has_gradients]},
            **cells,
            ours=us,
            **{RATIO: ratio(right, us)},
            **({"mmattn sdpa / ours": ratio([cells["mmattn sdpa"]], us)} if is_masked else {}),
            floor=floor(shape, batch, has_gradients, ceilings),
            **one_after_another,
            **took,
        )


def auto_took(inputs: Inputs) -> dict[str, str]:
    """What "auto" takes for calls one after another, and for those that are replayed."""
    took = {}
    for name, context in (("auto took", contextlib.nullcontext()), ("auto took, replayed", replayed())):
        with context:
            took[name] = explain(*inputs.tensors, key_mask=inputs.key_mask).chosen or "none"
    return took


def through_the_operation(inputs: Inputs) -> Tensor:
    """The same kernels by the road that torch.compile takes."""
    mask = None if inputs.key_mask is None else inputs.key_mask.unsqueeze(1)
    return short_key_attention(*inputs.tensors, mask, None, inputs.query.shape[3] ** -0.5)[0]


def without_checks(inputs: Inputs) -> Tensor:
    """Without `mmattn.attention` around it."""
    mask = None if inputs.key_mask is None else inputs.key_mask.unsqueeze(1)
    return attend(*inputs.tensors, mask, None, inputs.query.shape[3] ** -0.5)


def processor_rows(options: Options) -> None:
    """What a call costs the processor, calls too small to keep the card busy."""
    shape = Shape("", 1, 2, 5, 8, real=5) if options.tiny else SMALL
    inputs = Inputs(shape, 1 if options.tiny else 2, options.device)
    masked, count = inputs.key_mask, 1 if options.tiny else 300
    calls: dict[str, Callable[..., Tensor]] = {
        "torch SDPA": stock,
        "mmattn sdpa": ours("sdpa"),
        "mmattn triton": ours("triton"),
        "triton, the launcher alone": without_checks,
        "triton, as an operation": through_the_operation,
    }
    for name, call in calls.items():
        cells = {}
        for kind, mask in (("", None), ("key mask, ", masked)):
            inputs.key_mask = mask
            for tensor in inputs.tensors:
                tensor.requires_grad_(False)
            cells[f"{kind}forward"] = _cost(lambda: call(inputs), count, options)  # noqa: B023
            for tensor in inputs.tensors:
                tensor.requires_grad_()
            cells[f"{kind}forward, with gradients"] = _cost(lambda: call(inputs), count, options)  # noqa: B023
            both: Callable[[], object] = functools.partial(_with_backward, call, inputs)
            cells[f"{kind}forward + backward"] = _cost(both, count, options)
            # Autograd's own thread has to wait for Python's lock where the backward is Python.
            with torch.autograd.set_multithreading_enabled(False):
                cells[f"{kind}forward + backward in one thread"] = _cost(both, count // 3 or 1, options)
        options.add("Launching one call at short keys from Python, µs of the processor", call=name, **cells)


def _with_backward(call: Callable[..., Tensor], inputs: Inputs) -> object:
    return torch.autograd.grad(call(inputs), inputs.tensors, inputs.cotangent)


def _cost(call: Callable[[], object], count: int, options: Options) -> str:
    try:
        for _ in range(min(count, 20)):
            call()
        wait(options.device)
        return f"{host_us(call, count, options.device):.1f}"
    except Exception as error:
        tell(error)
        return "-"


def main() -> int:
    """The processor's time first, then the shapes."""
    options, status = read_options(__doc__), Status()
    if options.device == "cuda":
        compile_all()
    with options.turn() as begin:
        rows(begin, options, status)
    return status.code


def rows(begin: float, options: Options, status: Status) -> None:
    """All rows, shapes until `SECONDS` after `begin`."""
    processor_rows(options)
    ceilings = measure_ceilings(options)
    for shape, batch in [(shape, 2) for shape in (*TINY, *TINY_MASKED)] if options.tiny else in_order():
        if time.perf_counter() - begin > SECONDS:
            status.skip(f"{shape.name}, batch {batch}")
            continue
        with status.row(f"{shape.name}, batch {batch}"):
            measure_shape(shape, batch, ceilings, options)


if __name__ == "__main__":
    sys.exit(main())
