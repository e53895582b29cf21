"""Which configuration is the fastest: short-key attention on a card in several of them, beside torch's kernels.

For whoever changes the kernels or their table (`mmattn/kernels/short_keys_configs.py`); `short_keys.py` measures what
the table says. All configurations are printed; the table of rows has the best.

    python scripts/gpu/short_keys_choices.py [--rows FILE] [--tiny]        under 150 seconds on an H100
"""

from __future__ import annotations

import functools
import itertools
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
import triton
from attention import CACHE_BYTES, PINNED, SHAPES, Shape
from measure import Ceilings, Options, card_us, measure_ceilings, read_options, tell
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mmattn.kernels.launch import Launch
from mmattn.kernels.resources import compiling_for
from mmattn.kernels.short_keys import MAX_KEYS
from mmattn.kernels.short_keys_backward import backward_launches
from mmattn.kernels.short_keys_configs import BackwardConfig, ForwardConfig, SplitConfig
from mmattn.kernels.short_keys_forward import forward_launch
from mmattn.kernels.tiles import padded, tiles_of

Backward = BackwardConfig | SplitConfig
KERNELS = {name: PINNED[name] for name in ("cuDNN", "flash", "efficient")}
SECONDS = 140
BEGIN = time.perf_counter()


SHORT = [shape for shape in SHAPES if shape.keys <= MAX_KEYS]
BATCHES = (2, 4, 16)
TINY = [Shape("tiny", 2, 67, 77, 40)]


class Inputs:
    """Query, key, value and the output's gradient of one call."""

    def __init__(self, shape: Shape, batch: int, device: str, empty: bool = False) -> None:
        # On a CPU what is not just compiled is run by Triton's interpreter, which is wrong for bfloat16.
        dtype = torch.float16 if device == "cpu" and not empty else torch.bfloat16

        def draw(length: int) -> Tensor:
            tensor = torch.empty(batch, length, shape.heads, shape.head_dim, device=device, dtype=dtype)
            return (tensor if empty else tensor.normal_()).transpose(1, 2)

        self.query, self.key, self.value = draw(shape.queries), draw(shape.keys), draw(shape.keys)
        self.cotangent = draw(shape.queries)
        # About what random scores give, for the backward alone.
        self.lse = torch.full((batch, shape.heads, shape.queries), 5.0, device=device)
        self.scale = shape.head_dim**-0.5

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.query, self.key, self.value


BOTH_CUT, HEAD_CUT, KEYS_CUT, NOT_CUT = (True, True), (True, False), (False, True), (False, False)


def forward_choices(shape: Shape) -> list[ForwardConfig]:
    """What is tried for the forward: queries a block, blocks a program, warps, pipeline depth, what is cut in two."""
    if padded(shape.keys) > 128:
        return [ForwardConfig(64, 1, 4, depth) for depth in (1, 2)]
    choices = [(64, 1, 4, 1), (64, 2, 4, 2), (64, 4, 4, 3), (128, 1, 8, 1), (64, 2, 4, 2, *KEYS_CUT)]
    return _different(shape, [ForwardConfig(*choice) for choice in choices])


# One gradient a program, for few queries: queries a block, programs a processor, warps, depth.
SPLIT = [SplitConfig(*choice) for choice in ((64, 2.0, 4, 2), (64, 8.0, 4, 2), (128, 1.0, 8, 1), (128, 4.0, 8, 1))]
MOST_OF_FEW = 1024


def backward_choices(shape: Shape) -> list[Backward]:
    """What is tried for the backward: queries and keys a block, programs a processor, warps, depth, what is cut."""
    if padded(shape.keys) > 128:
        return [BackwardConfig(64, 64, 2.0, 4, depth, is_fused=False) for depth in (1, 2)]
    choices = [(64, 64, 2.0, 4, 2), (64, 64, 2.0, 4, 1), (64, 64, 2.0, 4, 2, *KEYS_CUT), (64, 64, 1.0, 8, 2)]
    choices += [(128, 64, 1.0, 8, 1), (128, 64, 1.0, 8, 1, *HEAD_CUT), (64, 64, 3.0, 4, 2)]
    if shape.head_dim > 64:
        choices += [(64, 64, 2.0, 4, 2, *BOTH_CUT, False), (64, 128, 1.0, 8, 2, *BOTH_CUT, False)]
    few = SPLIT if shape.queries <= MOST_OF_FEW else []
    return [*_different(shape, [BackwardConfig(*choice) for choice in choices]), *few]


Config = TypeVar("Config", ForwardConfig, BackwardConfig)


def _different(shape: Shape, choices: list[Config]) -> list[Config]:
    """Without those that differ only in cutting what needs no cutting."""
    is_power = {"is_head_cut": len(tiles_of(shape.head_dim)) == 1, "are_keys_cut": len(tiles_of(shape.keys)) == 1}
    flags = [name for name, is_same in is_power.items() if is_same]
    return list(dict.fromkeys(replace(choice, **dict.fromkeys(flags, True)) for choice in choices))


def forward_of(inputs: Inputs, config: ForwardConfig | None) -> tuple[Launch, Tensor, Tensor]:
    """The forward's launch, its output and log-sum-exp."""
    output = torch.empty_like(inputs.query)
    lse = inputs.query.new_empty(inputs.query.shape[:3], dtype=torch.float32)
    return forward_launch(*inputs.tensors, None, None, inputs.scale, output, lse, config), output, lse


def backward_of(inputs: Inputs, output: Tensor, lse: Tensor, config: Backward | None) -> tuple[Launch, ...]:
    """The backward's launches."""
    arguments = (inputs.cotangent, *inputs.tensors, output, lse, None, None, inputs.scale)
    return backward_launches(*arguments, config).launches


Job = tuple[Shape, int, "ForwardConfig | Backward", int, int]


def job_launches(job: Job) -> tuple[Launch, ...]:
    """What a configuration launches for a shape and batch; within `compiling_for`."""
    shape, batch, config = job[:3]
    inputs = Inputs(shape, batch, "cpu", empty=True)
    if isinstance(config, ForwardConfig):
        return (forward_of(inputs, config)[0],)
    return backward_of(inputs, inputs.query, inputs.lse, config)


def compile_job(job: Job) -> str | None:
    """Compile into Triton's cache on disk; the error if it cannot be."""
    try:
        with compiling_for(*job[3:]):
            for launch in job_launches(job):
                launch.compile()
    except Exception as error:
        return f"{job[0].name} {job[2]}: {type(error).__name__}: {str(error)[:200]}"
    return None


def is_new(job: Job, seen: set[Any]) -> bool:
    """Is any of its launches compiled differently from all before? (Tensors and numbers in them do not count.)"""
    before = len(seen)
    with compiling_for(*job[3:]):
        launches = job_launches(job)
    for launch in launches:
        constants = {name: value for name, value in launch.arguments.items() if name.isupper()}
        warps = (launch.num_warps, launch.num_stages)
        seen.add((launch.kernel.__name__, job[0].head_dim, job[0].heads, warps, *constants.items()))
    return len(seen) > before


def compile_all(shapes: list[Shape]) -> None:
    """Compile all that will be timed, in processes of their own."""
    major, minor = torch.cuda.get_device_capability()
    card = (10 * major + minor, torch.cuda.get_device_properties(0).multi_processor_count)
    seen: set[Any] = set()
    jobs = [
        job
        for shape, batch in itertools.product(shapes, BATCHES)
        for config in (*backward_choices(shape), *forward_choices(shape))
        if is_new(job := (shape, batch, config, *card), seen)
    ]
    with multiprocessing.get_context("spawn").Pool(max(1, (os.cpu_count() or 2) - 7)) as pool:
        for problem in pool.imap_unordered(compile_job, jobs):
            if problem:
                print(f"  not compiled: {problem}", flush=True)
    print(f"compiled for {len(jobs)} configurations after {time.perf_counter() - BEGIN:.0f} s", flush=True)


def timed(run: Callable[[Inputs], object], sets: list[Inputs], device: str) -> float:
    """Microseconds of one call; infinite if there is no such kernel for the call."""
    try:
        return card_us([functools.partial(run, inputs) for inputs in sets], device)[0]
    except Exception as error:
        tell(error)
        torch.cuda.empty_cache()
        return math.inf


def pinned(kernel: SDPBackend, has_gradients: bool) -> Callable[[Inputs], object]:
    """torch's kernel, with its backward if wanted."""

    def run(inputs: Inputs) -> object:
        with sdpa_kernel(kernel):
            output = F.scaled_dot_product_attention(*inputs.tensors)
        return torch.autograd.grad(output, inputs.tensors, inputs.cotangent) if has_gradients else output

    return run


def ours(forward: ForwardConfig, backward: Backward | None) -> Callable[[Inputs], object]:
    """Our kernels, with the backward if its configuration is given."""

    def run(inputs: Inputs) -> object:
        launch, output, lse = forward_of(inputs, forward)
        launch.run(inputs.query.device)
        if backward is not None:
            for each in backward_of(inputs, output, lse, backward):
                each.run(inputs.query.device)
        return output

    return run


def backward_only(config: Backward) -> Callable[[Inputs], object]:
    """Our backward by itself; its forward was run before."""

    def run(inputs: Inputs) -> object:
        for each in backward_of(inputs, inputs.query, inputs.lse, config):
            each.run(inputs.query.device)
        return inputs

    return run


def floor(shape: Shape, batch: int, has_gradients: bool, ceilings: Ceilings) -> str:
    """Query, key, value, output once; backward reads three of them and the output's gradient, and writes three."""
    rows, columns = (batch * shape.heads * length * shape.head_dim * 2.0 for length in (shape.queries, shape.keys))
    moved, flops = 2 * rows + 2 * columns, 4.0 * batch * shape.heads * shape.queries * shape.keys * shape.head_dim
    if has_gradients:
        moved, flops = moved + 3 * rows + 4 * columns, 3.5 * flops
    microseconds, which = ceilings.floor_us(moved, flops)
    return f"{microseconds:.1f} ({which})"


def short(config: ForwardConfig | Backward) -> str:
    """The numbers of a configuration in their order."""
    if isinstance(config, SplitConfig):
        numbers = (config.block_m, config.programs_per_processor, config.num_warps, config.num_stages)
        return "/".join(f"{number:g}" for number in numbers) + " one gradient a program"
    cuts = ("is_head_cut", "are_keys_cut", "is_fused")
    numbers = [value for name, value in vars(config).items() if name not in cuts]
    cut = {BOTH_CUT: "", HEAD_CUT: " keys padded", KEYS_CUT: " head padded", NOT_CUT: " padded"}
    note = "" if getattr(config, "is_fused", True) else " in two"
    return "/".join(f"{number:g}" for number in numbers) + cut[config.is_head_cut, config.are_keys_cut] + note


def best_of(times: dict[Any, float], what: str) -> tuple[Any, float]:
    """The fastest; all are printed."""
    ranked = sorted(times.items(), key=lambda pair: pair[1])
    print(f"    {what}: " + ", ".join(f"{short(config)} {us:.1f}" for config, us in ranked), flush=True)
    return ranked[0]


def measure_shape(shape: Shape, batch: int, ceilings: Ceilings, options: Options) -> Iterator[dict[str, str]]:
    """A row for the forward and one for forward with backward."""
    nbytes = sum(tensor.nbytes for tensor in Inputs(shape, batch, "cpu", empty=True).tensors)
    count = 2 if options.tiny else max(2, min(24, math.ceil(CACHE_BYTES / nbytes)))
    sets = [Inputs(shape, batch, options.device) for _ in range(count)]
    print(f"  {shape.name}, batch {batch}, after {time.perf_counter() - BEGIN:.0f} s", flush=True)
    forward_times = {c: timed(ours(c, None), sets, options.device) for c in forward_choices(shape)}
    forward, _ = best_of(forward_times, "forward")
    backward_times = {c: timed(backward_only(c), sets, options.device) for c in backward_choices(shape)}
    backward, backward_us = best_of(backward_times, "backward")
    for has_gradients in (False, True):
        for inputs in sets:
            for tensor in inputs.tensors:
                tensor.requires_grad_(has_gradients)
        theirs = {name: timed(pinned(k, has_gradients), sets, options.device) for name, k in KERNELS.items()}
        for inputs in sets:
            for tensor in inputs.tensors:
                tensor.requires_grad_(False)
        us = timed(ours(forward, backward if has_gradients else None), sets, options.device)
        sizes = f"{shape.queries} x {shape.keys}, {shape.heads} heads of {shape.head_dim}"
        yield {
            "shape": shape.name,
            "sizes": sizes,
            "batch": str(batch),
            "pass": "forward + backward" if has_gradients else "forward",
            **{name: f"{value:.1f}" for name, value in theirs.items()},
            "ours": f"{us:.1f}",
            "best of torch / ours": f"{min(theirs.values()) / us:.2f}",
            "floor": floor(shape, batch, has_gradients, ceilings),
            "configuration": f"{short(backward)}, alone {backward_us:.1f}" if has_gradients else short(forward),
        }


def markdown(rows: list[dict[str, str]]) -> str:
    """A table; every row has the same columns."""
    lines = [f"| {' | '.join(rows[0])} |", "|---" * len(rows[0]) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row.values())} |" for row in rows)])


def main() -> int:
    """Every shape, then the table."""
    options = read_options(__doc__)
    shapes = TINY if options.tiny else SHORT
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}", flush=True)
    compile_all(shapes)
    ceilings = measure_ceilings(options)
    rows = []
    for batch, shape in itertools.product(BATCHES, shapes):
        if time.perf_counter() - BEGIN > SECONDS:
            print(f"out of time: {shape.name}, batch {batch} not measured", flush=True)
            continue
        for row in measure_shape(shape, batch, ceilings, options):
            options.add("Short-key attention, µs", **row)
            rows.append(row)
    print(f"copy {ceilings.bytes_per_s / 1e12:.2f} TB/s, bf16 product {ceilings.flops_per_s / 1e12:.0f} TFLOP/s")
    print(markdown(rows), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
