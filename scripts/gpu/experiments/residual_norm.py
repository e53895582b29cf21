"""Residual and norm in one Triton kernel beside torch: x + out and its LayerNorm, both results wanted.

The end of an attention: `out` is what its output projection gave, x the rows it is added to; the sum goes on as the
residual, its LayerNorm into what comes next. Forward, bfloat16, at U-Nets' and PixArt's sizes, microseconds of the
card: variants replayed in turn as CUDA graphs over inputs larger than its cache, medians. The floor is each of the four
moved once. Every variant is held to float64 by the tolerance rule before it is timed.

    python scripts/gpu/experiments/residual_norm.py [--rows FILE] [--resources] [--tiny --device cpu]

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
from residual_norm_kernel import CONFIGS, Config, residual_norm, residual_norm_launch
from torch import Tensor
from torch.nn.functional import layer_norm

from mmattn.kernels.launch import Launch

TINY = [Shape("tiny", 2, 3, 3, 24)]


class Inputs(NamedTuple):
    """Of one call: rows [N, C], LayerNorm's parameters [C]."""

    x: Tensor
    out: Tensor
    gamma: Tensor
    beta: Tensor

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self)


def make(shape: Shape, batch: int, device: str, dtype: torch.dtype) -> Inputs:
    """Random ones; rows have a mean, as a residual has."""
    rows, width = batch * shape.queries, experiment.width(shape)
    x, out = (torch.randn(rows, width, device=device, dtype=dtype) for _ in range(2))
    gamma, beta = (torch.randn(width, device=device, dtype=dtype) for _ in range(2))
    return Inputs(x + 0.5, out, gamma, beta)


def stock(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """torch's two operations."""
    total = inputs.x + inputs.out
    return total, layer_norm(total, total.shape[-1:], inputs.gamma, inputs.beta)


def exact(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """In float64."""
    return stock(Inputs(*(tensor.double() for tensor in inputs)))


def ours(config: Config, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Our kernel."""
    return residual_norm(*inputs, config=config)


def name_of(config: Config) -> str:
    """As a line has it."""
    return f"rows {config.rows}, warps {config.num_warps}"


def variants(_: Shape) -> dict[str, dict[str, experiment.Run]]:
    """Our kernel in every configuration."""
    return {"ours": {name_of(config): functools.partial(ours, config) for config in CONFIGS}}


def cost(shape: Shape, batch: int) -> tuple[float, float]:
    """Two read and two written; next to no arithmetic."""
    return 4 * 2.0 * batch * shape.queries * experiment.width(shape), 0.0


EXPERIMENT = experiment.Experiment(
    "Residual and norm, µs", make=make, stock={"eager": stock}, ours=variants, cost=cost, exact=exact
)


def launches() -> Iterator[tuple[str, Launch]]:
    """For each width and configuration, on tensors that are only compiled for."""
    for width in dict.fromkeys(map(experiment.width, experiment.BLOCKS)):
        x, gamma = (torch.empty(*sizes, width, dtype=torch.bfloat16) for sizes in ((4096,), ()))
        for config in CONFIGS:
            what = f"rows of {width}, {name_of(config)}"
            yield what, residual_norm_launch(x, x, gamma, gamma, 1e-5, x, x, config)


def main() -> int:
    """All shapes."""
    options = experiment.start(__doc__, launches)
    experiment.compile_launches(launches, options)
    return experiment.run_experiment(EXPERIMENT, experiment.cases(options, TINY), options)


if __name__ == "__main__":
    sys.exit(main())
