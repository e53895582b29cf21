"""GroupNorm, with the time embedding before it and SiLU after it, by mmattn's kernels beside torch: training.

What a ResNet of a U-Net does before its second convolution, on pictures in channels-last. torch's GroupNorm lays
pictures out in rows of pixels on a card, and under autocast it and SiLU run in float32: "autocast" is what training
does without a compiler. Forward and backward together, bfloat16, at U-Nets' sizes, microseconds of the card: variants
replayed in turn as CUDA graphs over inputs larger than its cache, medians. The floor is what cannot be helped: pictures
read twice and written once, and with the gradient the same again and the gradient twice. Every variant is held to
float64 by the tolerance rule before it is timed.

    python scripts/gpu/experiments/group_norm_silu.py [--rows FILE] [--resources] [--tiny --device cpu]

About two minutes on an H100. A verdict for each shape: a gain over what torch.compile makes of it, or none.
"""

from __future__ import annotations

import functools
import itertools
import math
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple
from unittest import mock

import experiment
import torch
from attention import Shape
from torch import Tensor
from torch.nn.functional import group_norm, silu

from mmattn.kernels import group_norm as ours
from mmattn.kernels.group_norm_launches import CONFIGS, Config, Cut, backward_launches, forward_launches
from mmattn.kernels.launch import Launch
from mmattn.kernels.tiles import power_of_two

SHAPES = [shape for shape in experiment.BLOCKS if shape.name.startswith("SD")]
TINY = [Shape("tiny", 2, 9, 3, 16)]
GROUPS, TINY_GROUPS = 32, 4
EPS = 1e-5


class Inputs(NamedTuple):
    """Of one call: pictures [B, C, H, W] in channels-last, parameters [C] in float32, time embeddings [B, C], and the
    gradient of the output."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    shift: Tensor
    grad: Tensor

    @property
    def nbytes(self) -> int:
        return self.x.nbytes + self.grad.nbytes

    @property
    def groups(self) -> int:
        return GROUPS if self.x.shape[1] % GROUPS == 0 else TINY_GROUPS


def make(shape: Shape, batch: int, device: str, dtype: torch.dtype) -> Inputs:
    """Random ones; pictures have a mean, as a residual has."""
    width, side = experiment.width(shape), math.isqrt(shape.queries)

    def picture() -> Tensor:
        return (torch.randn(batch, side, side, width, device=device) + 0.5).to(dtype).permute(0, 3, 1, 2)

    weight, bias = (torch.randn(width, device=device).requires_grad_() for _ in range(2))
    shift = torch.randn(batch, width, device=device, dtype=dtype).requires_grad_()
    return Inputs(picture().requires_grad_(), weight, bias, shift, picture())


Norm = Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]


def with_gradients(norm: Norm, inputs: Inputs) -> tuple[Tensor, ...]:
    """The output of one kind of norm, and all gradients."""
    leaves = inputs[:4]
    out = norm(*leaves, inputs.groups)
    return (out.detach(), *torch.autograd.grad(out, leaves, inputs.grad))


def autocast_norm(x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor, groups: int) -> Tensor:
    """As autocast has it: in float32, rounded for the convolution that comes."""
    x = x + shift[:, :, None, None]
    return silu(group_norm(x.float(), groups, weight, bias, EPS)).to(x.dtype)


def our_norm(x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor, groups: int) -> Tensor:
    """Our kernels."""
    return ours.group_norm(x, weight, bias, shift, groups, EPS, True)


def with_config(config: Config, inputs: Inputs) -> tuple[Tensor, ...]:
    """Ours, cut up so."""
    with mock.patch.object(ours, "norm_config", return_value=config):
        return with_gradients(our_norm, inputs)


def exact(inputs: Inputs) -> tuple[Tensor, ...]:
    """In float64."""
    doubles = [tensor.detach().double().requires_grad_() for tensor in inputs]
    return with_gradients(double_norm, Inputs(*doubles))


def double_norm(x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor, groups: int) -> Tensor:
    """The definition."""
    return silu(group_norm(x + shift[:, :, None, None], groups, weight, bias, EPS))


def name_of(config: Config) -> str:
    """As a line has it."""
    return f"{config.rows} pixels x {config.columns}, warps {config.num_warps}"


def variants(_: Shape) -> dict[str, dict[str, experiment.Run]]:
    """Our kernels in every configuration."""
    return {"ours": {name_of(config): functools.partial(with_config, config) for config in CONFIGS}}


def cost(shape: Shape, batch: int) -> tuple[float, float]:
    """Read twice and written, and the same with the gradient, which is read twice as well; next to no arithmetic."""
    return 8 * 2.0 * batch * shape.queries * experiment.width(shape), 0.0


EXPERIMENT = experiment.Experiment(
    "GroupNorm and SiLU, forward + backward, µs",
    make=make,
    stock={"autocast": experiment.WithGradients(autocast_norm, with_gradients)},
    ours=variants,
    cost=cost,
    exact=exact,
)


def launches() -> Iterator[tuple[str, Launch]]:
    """For each shape, batch and configuration, on tensors that are only compiled for; what is cut up alike, once."""
    seen: set[str] = set()
    for shape, batch, config in itertools.product(SHAPES, experiment.BATCHES, CONFIGS):
        width = experiment.width(shape)
        side = math.isqrt(shape.queries)
        x = torch.empty(batch, width, side, side, dtype=torch.bfloat16, memory_format=torch.channels_last)
        cut = Cut.of(x, GROUPS, config)
        what = f"{width} channels, {name_of(config)}, up to {power_of_two(cut.num_shares)} shares"
        if what in seen:
            continue
        seen.add(what)
        weight, shift = torch.empty(width), torch.empty(batch, width, dtype=torch.bfloat16)
        norms = torch.empty(batch, 3, width)
        made = forward_launches(cut, x, weight, weight, shift, EPS, True, x, norms)
        made += backward_launches(cut, x, weight, weight, norms, x, True, x, (weight, weight), shift)
        for launch in made:
            yield what, launch


def main() -> int:
    """All shapes."""
    options = experiment.start(__doc__, launches)
    experiment.compile_launches(launches, options)
    return experiment.run_experiment(EXPERIMENT, experiment.cases(options, TINY, SHAPES), options)


if __name__ == "__main__":
    sys.exit(main())
