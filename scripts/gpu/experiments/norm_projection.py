"""LayerNorm and the query projection after it in one Triton kernel beside torch.

The beginning of a cross-attention: its rows are normalised and projected to queries. Two kernels of ours: one
normalises rows on their way into the products, the other has gamma and beta folded into the projection and corrects the
products at the end. Beside torch's two operations, as they are, compiled, and with gamma and beta folded into the
projection too (exact but for rounding the weight), and beside the projection alone, which no variant can do without.

Forward, bfloat16, at U-Nets' and PixArt's sizes (whose queries have a bias; it has no norm there, its size is what is
wanted), microseconds of the card: variants replayed in turn as CUDA graphs over inputs and weights larger than its
cache, medians. The floor is rows, weight and queries moved once, or the products. Every variant is held to float64 by
the tolerance rule before it is timed.

    python scripts/gpu/experiments/norm_projection.py [--rows FILE] [--resources] [--tiny --device cpu]

About two minutes on an H100. A verdict for each shape: a gain over what torch.compile makes of it, or none.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from typing import NamedTuple

import experiment
import torch
from attention import Shape
from norm_projection_kernel import (
    CONFIGS,
    Config,
    Folded,
    fold,
    folded_norm_projection,
    folded_norm_projection_launch,
    norm_projection,
    norm_projection_launch,
)
from torch import Tensor
from torch.nn.functional import layer_norm, linear

from mmattn.kernels.launch import Launch

TINY = [Shape("tiny", 2, 3, 3, 32)]
EPS = 1e-5


class Inputs(NamedTuple):
    """Of one call: rows [N, C], LayerNorm's parameters [C], the projection [C, C] and its bias, all of these folded in
    one, and the bias of that in the dtype of the rows, as torch wants it."""

    x: Tensor
    gamma: Tensor
    beta: Tensor
    weight: Tensor
    bias: Tensor | None
    folded: Folded
    low_bias: Tensor

    @property
    def nbytes(self) -> int:
        return self.x.nbytes + self.weight.nbytes

    @property
    def parameters(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        return self[:5]


def has_bias(shape: Shape) -> bool:
    """U-Nets' queries have none."""
    return shape.name.startswith("PixArt")


def make(shape: Shape, batch: int, device: str, dtype: torch.dtype) -> Inputs:
    """Random ones; rows have a mean, as a residual has, and queries are about as large as rows."""
    rows, width = batch * shape.queries, experiment.width(shape)

    def draw(*sizes: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*sizes, device=device) * scale).to(dtype)

    gamma, beta, weight = draw(width), draw(width), draw(width, width, scale=width**-0.5)
    bias = draw(width) if has_bias(shape) else None
    folded = fold(gamma, beta, weight, bias)
    return Inputs(draw(rows, width) + 0.5, gamma, beta, weight, bias, folded, folded.bias.to(dtype))


def stock(inputs: Inputs) -> Tensor:
    """torch's two operations."""
    x, gamma, beta, weight, bias = inputs.parameters
    return linear(layer_norm(x, x.shape[-1:], gamma, beta, EPS), weight, bias)


def stock_folded(inputs: Inputs) -> Tensor:
    """The same with gamma and beta in the projection."""
    x = inputs.x
    return linear(layer_norm(x, x.shape[-1:], eps=EPS), inputs.folded.weight, inputs.low_bias)


def exact(inputs: Inputs) -> Tensor:
    """The definition in float64."""
    x, gamma, beta, weight, bias = (None if tensor is None else tensor.double() for tensor in inputs.parameters)
    assert x is not None
    assert weight is not None
    return linear(layer_norm(x, x.shape[-1:], gamma, beta, EPS), weight, bias)


def projection_alone(inputs: Inputs) -> Tensor:
    """Without the norm."""
    return linear(inputs.x, inputs.weight, inputs.bias)


def normalising(config: Config, inputs: Inputs) -> Tensor:
    """Our kernel that normalises."""
    return norm_projection(*inputs.parameters, EPS, config)


def correcting(config: Config, inputs: Inputs) -> Tensor:
    """Our kernel that corrects the products."""
    return folded_norm_projection(inputs.x, inputs.folded, EPS, config)


def name_of(config: Config) -> str:
    """As a line has it."""
    return f"{config.block_m} x {config.block_n}, warps {config.num_warps}, stages {config.num_stages}"


KINDS = {"ours": normalising, "ours, folded": correcting}


def variants(_: Shape) -> dict[str, dict[str, experiment.Run]]:
    """Our kernels in every configuration."""
    return {
        kind: {name_of(config): functools.partial(run, config) for config in CONFIGS} for kind, run in KINDS.items()
    }


def cost(shape: Shape, batch: int) -> tuple[float, float]:
    """Rows, weight and queries moved once; the products."""
    rows, width = batch * shape.queries, experiment.width(shape)
    return 2.0 * (2 * rows * width + width * width), 2.0 * rows * width * width


EXPERIMENT = experiment.Experiment(
    "Norm and query projection, µs",
    make=make,
    stock={"eager": stock, "folded": stock_folded},
    ours=variants,
    cost=cost,
    exact=exact,
    beside={"projection alone": projection_alone},
)


def launches() -> Iterator[tuple[str, Launch]]:
    """For each width and configuration, on tensors that are only compiled for."""

    def empty(*sizes: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(*sizes, dtype=dtype)

    for shape in {experiment.width(shape): shape for shape in experiment.BLOCKS}.values():
        width = experiment.width(shape)
        x, gamma, weight, wide = (
            empty(4096, width),
            empty(width),
            empty(width, width),
            empty(width, dtype=torch.float32),
        )
        bias = gamma if has_bias(shape) else None
        for config in CONFIGS:
            what = f"{width} columns, {name_of(config)}"
            yield what, norm_projection_launch(x, gamma, gamma, weight, bias, EPS, x, config)
            yield what, folded_norm_projection_launch(x, Folded(weight, wide, wide), EPS, x, config)


def main() -> int:
    """All shapes."""
    options = experiment.start(__doc__, launches)
    experiment.compile_launches(launches, options)
    return experiment.run_experiment(EXPERIMENT, experiment.cases(options, TINY), options)


if __name__ == "__main__":
    sys.exit(main())
