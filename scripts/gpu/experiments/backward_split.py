"""The backward over short keys by programs that compute one gradient each, beside the package's.

The package's backward gains little where there are few queries (16 x 16 and 32 x 32 places): a program for each share
of the queries computes all three gradients, and a second kernel adds what the shares found for keys and values. With a
program for each gradient there are more programs, which need fewer registers, and where one of them walks over all
queries of a head there is nothing to add; scores are computed three times for it.

bfloat16, [B, L, H, D], microseconds of the card for the backward alone, calls replayed as one CUDA graph over inputs
larger than its cache, medians. "best / ours" is torch's best kernel, forward and backward, over our forward with one of
the backwards. Gradients are held to float64 by the tolerance rule before anything is timed.

    python scripts/gpu/experiments/backward_split.py [--rows FILE] [--resources] [--tiny --device cpu]

About two minutes on an H100. A verdict for each shape: a gain over the package's backward, or none.
"""

from __future__ import annotations

import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator

import experiment
import torch
from attention import CACHE_BYTES, SHAPES, Shape
from backward_split_kernel import SplitConfig, split_backward_launches
from measure import Options, measure_ceilings
from short_keys_choices import KERNELS, Inputs, backward_of, floor, forward_of, pinned, timed
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from mmattn.kernels.launch import Launch

SECONDS = 60  # of its turn, after which no further shape is begun
BATCHES = (2, 4)
WANTED = [shape for shape in SHAPES if shape.keys == 77 and shape.queries <= 1024]
TINY = [Shape("tiny", 2, 67, 77, 40)]
CHOICES = [
    SplitConfig(*choice)
    for choice in (
        (64, 1, 4, 1, True, True),
        (64, 1, 8, 1, True, False),
        (64, 2, 4, 1, True, True),
        (64, 2, 8, 1, True, False),
        (64, 4, 4, 1, True, True),
        (64, 4, 8, 2, True, False),
        (128, 1, 8, 1, True, True),
        (128, 2, 8, 1, True, True),
        (128, 4, 8, 1, True, False),
    )
]
Launches = Callable[[Inputs], tuple[Launch, ...]]


def short(config: SplitConfig) -> str:
    """A configuration in a cell: queries a block, splits, warps, depth."""
    cut = "" if config.are_keys_cut else " padded"
    turned = " turned" if config.is_turned else ""
    return f"{config.block_m}+{config.block_q}/{config.splits}/{config.num_warps}/{config.num_stages}{cut}{turned}"


def split_of(config: SplitConfig) -> Launches:
    """This experiment's launches for a call."""

    def launches(inputs: Inputs) -> tuple[Launch, ...]:
        return split_backward_launches(
            inputs.cotangent, *inputs.tensors, inputs.lse, None, None, inputs.scale, config
        ).launches

    return launches


def package_of(inputs: Inputs) -> tuple[Launch, ...]:
    """The package's."""
    return backward_of(inputs, inputs.query, inputs.lse, None)


def running(launches: Launches) -> Callable[[Inputs], object]:
    """All launches of a call, one after another."""

    def run(inputs: Inputs) -> object:
        for launch in launches(inputs):
            launch.run(inputs.query.device)
        return inputs

    return run


def check(shape: Shape, config: SplitConfig, device: str) -> str | None:
    """What is wrong with the gradients of so many heads, keys and numbers a head; of fewer queries."""
    inputs = Inputs(Shape(shape.name, shape.heads, min(shape.queries, 131), shape.keys, shape.head_dim), 2, device)
    forward, output, inputs.lse = forward_of(inputs, None)
    forward.run(output.device)
    arguments = (inputs.cotangent, *inputs.tensors, inputs.lse, None, None, inputs.scale)
    found = split_backward_launches(*arguments, config)
    for launch in found.launches:
        launch.run(output.device)

    def by_autograd(dtype: torch.dtype) -> tuple[Tensor, ...]:
        query, key, value = (tensor.to(dtype).requires_grad_() for tensor in inputs.tensors)
        with sdpa_kernel(SDPBackend.MATH):
            attended = scaled_dot_product_attention(query, key, value)
        return torch.autograd.grad(attended, (query, key, value), inputs.cotangent.to(dtype))

    ours = (found.grad_query, found.grad_key, found.grad_value)
    return experiment.wrong(ours, by_autograd(output.dtype), by_autograd(torch.float64))


def launches() -> Iterator[tuple[str, Launch]]:
    """Every configuration at every shape. (The batch is no constant of the kernels.)"""
    for shape, config in itertools.product(WANTED, CHOICES):
        for launch in split_of(config)(Inputs(shape, 2, "cpu", empty=True)):
            yield f"{shape.name}, {short(config)}", launch


def measure_shape(shape: Shape, batch: int, options: Options) -> dict[str, str]:
    """A row: the package's backward, the best of this one, and both beside torch."""
    nbytes = sum(tensor.nbytes for tensor in Inputs(shape, batch, "cpu", empty=True).tensors)
    count = 2 if options.tiny else max(2, min(24, math.ceil(CACHE_BYTES / nbytes)))
    sets = [Inputs(shape, batch, options.device) for _ in range(count)]
    forward = timed(running(lambda inputs: (forward_of(inputs, None)[0],)), sets, options.device)
    package = timed(running(package_of), sets, options.device)
    choices = CHOICES[2:3] if options.tiny else CHOICES
    times = {config: timed(running(split_of(config)), sets, options.device) for config in choices}
    ranked = sorted(times, key=lambda config: times[config])
    where = f"{shape.name}, batch {batch}"
    print(f"  {where}: " + ", ".join(f"{short(config)} {times[config]:.1f}" for config in ranked), flush=True)
    best = times[ranked[0]]
    for inputs in sets:
        for tensor in inputs.tensors:
            tensor.requires_grad_()
    theirs = min(timed(pinned(kernel, True), sets, options.device) for kernel in KERNELS.values())
    gain = package / best
    said = f"{'GAIN' if gain >= experiment.GAIN else 'no gain'} over the package's: {gain:.2f}"
    said = said if options.device == "cuda" else "none: not a card"
    print(f"verdict, {where}: {said}", flush=True)
    return {
        "shape": shape.name,
        "sizes": f"{shape.queries} x {shape.keys}, {shape.heads} heads of {shape.head_dim}",
        "batch": str(batch),
        "package": f"{package:.1f}",
        "one gradient a program": f"{best:.1f} ({short(ranked[0])})",
        "best / ours, package": f"{theirs / (forward + package):.2f}",
        "best / ours, one gradient a program": f"{theirs / (forward + best):.2f}",
        "verdict": said,
    }


def main() -> int:
    """All shapes; 1 if a gradient is wrong."""
    options = experiment.start(__doc__, launches)
    shapes = TINY if options.tiny else WANTED
    cases = [(shape, batch) for batch, shape in itertools.product(BATCHES, shapes)]
    experiment.compile_launches(launches, options)
    problems = [
        f"{shape.name}, {short(config)}: {problem}"
        for shape, config in itertools.product(shapes, CHOICES)
        if (problem := check(shape, config, options.device))
    ]
    print("\n".join(problems) or "gradients are right", flush=True)
    with options.turn() as begin:
        ceilings = measure_ceilings(options)
        for shape, batch in cases:
            if time.perf_counter() - begin > SECONDS:
                print(f"out of time: {shape.name}, batch {batch} not measured", flush=True)
                continue
            cells = measure_shape(shape, batch, options)
            options.add("Backward, one gradient a program, µs", **cells, floor=floor(shape, batch, True, ceilings))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
