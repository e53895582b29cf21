"""Projections folded into a prompt's keys and values (scripts/gpu/experiments): the same as projecting."""

import functools

import pytest
import torch

from mmattn.ops.attention import attention
from mmattn.ops.tolerance import FORWARD_FACTOR
from scripts.gpu.experiments.folded import MULTIPLE, Projections, attend_folded, attend_projected, fold, unavoidable
from tests.ops.cases import generator_for
from tests.tolerance import check_within


# Keys that fit as they are, and that are filled up; as many prompts as rows, and one for several.
@pytest.mark.parametrize(("heads", "rows", "prompts"), [(8, 2, 2), (5, 6, 2)], ids=["8 heads", "5 heads, shared"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_as_projecting_does(heads, rows, prompts, dtype):
    head_dim, length, places, channels = 12, 77, 37, 53
    generator = generator_for(heads, 103)

    def draw(*sizes):
        return torch.randn(*sizes, generator=generator).to(dtype)

    inner = heads * head_dim
    given = Projections(draw(inner, channels) * channels**-0.5, draw(channels, inner) * inner**-0.5, draw(channels))
    x, key, value = draw(rows, places, channels), *(draw(prompts, heads, length, head_dim) for _ in range(2))
    eager = functools.partial(attention, backend="eager")

    def projected(dtype):
        weights = Projections(*(each.to(dtype) for each in (given.query, given.output, given.bias)))
        tensors = (each.to(dtype).repeat_interleave(rows // prompts, dim=0) for each in (key, value))
        return attend_projected(x.to(dtype), weights, *tensors, eager)

    folded = fold(given, key, value, head_dim**-0.5)
    assert folded.key.shape == folded.value.shape == (prompts, heads * (77 if heads == 8 else 80), channels)
    assert folded.key.shape[1] % MULTIPLE == 0
    got = attend_folded(x, folded)
    check_within(
        got, projected(dtype), projected(torch.float64), factor=FORWARD_FACTOR, what="folded",
        unavoidable=unavoidable(x, folded),
    )  # fmt: skip
