"""Kernels of experiments with norms, on Triton's interpreter: against float64 under the tolerance rule."""

import pytest
import torch
from torch.nn.functional import layer_norm, linear

from tests.tolerance import FORWARD_FACTOR, check_within

pytest.importorskip("triton")
pytestmark = pytest.mark.interpreter

# Imported here, after the check: they need triton.
from scripts.gpu.experiments.norm_projection_kernel import (  # noqa: E402
    CONFIGS,
    fold,
    folded_norm_projection,
    norm_projection,
)
from scripts.gpu.experiments.residual_norm_kernel import Config, residual_norm  # noqa: E402

HALF_AND_SINGLE = (torch.float16, torch.float32)


def draw(*shape, dtype):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def rows(count, width, dtype):
    """As a residual has them: with a mean, and some numbers that are far from the others."""
    x = draw(count, width, dtype=torch.float32) + 3
    x[:, 1] = 100
    return x.to(dtype)


def add_and_norm(x, out, gamma, beta):
    total = x + out
    return total, layer_norm(total, total.shape[-1:], gamma, beta)


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize(("width", "config"), [(320, Config(2, 4)), (40, Config(1, 1)), (23, Config(4, 4))], ids=str)
def test_residual_and_norm(width, config, dtype):
    x, out, gamma, beta = rows(5, width, dtype), *(draw(*sizes, width, dtype=dtype) for sizes in ((5,), (), ()))
    got, eager = residual_norm(x, out, gamma, beta, config=config), add_and_norm(x, out, gamma, beta)
    exact = add_and_norm(*(tensor.double() for tensor in (x, out, gamma, beta)))
    assert torch.equal(got[0], eager[0])
    check_within(got[1], eager[1], exact[1], factor=FORWARD_FACTOR, what="norm")


def test_what_is_not_contiguous_or_not_alike_is_refused():
    x, gamma = torch.zeros(4, 16), torch.ones(16)
    with pytest.raises(ValueError, match=r"call \.contiguous\(\) first"):
        residual_norm(x, torch.zeros(16, 4).T, gamma, gamma)
    with pytest.raises(ValueError, match="give two alike"):
        residual_norm(x, torch.zeros(4, 16, dtype=torch.float16), gamma, gamma)


def norm_and_project(x, gamma, beta, weight, bias):
    return linear(layer_norm(x, x.shape[-1:], gamma, beta), weight, bias)


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize(
    ("width", "columns", "has_bias", "config"),
    [(320, 72, True, CONFIGS[3]), (64, 128, False, CONFIGS[2]), (192, 40, True, CONFIGS[0])],
    ids=str,
)
def test_norm_and_projection(width, columns, has_bias, config, dtype):
    x, gamma, beta = rows(67, width, dtype), draw(width, dtype=dtype), draw(width, dtype=dtype).flip(0)
    weight = draw(columns, width, dtype=torch.float32).mul(width**-0.5).to(dtype)
    tensors = (x, gamma, beta, weight, draw(columns, dtype=dtype) if has_bias else None)
    eager = norm_and_project(*tensors)
    exact = norm_and_project(*(None if tensor is None else tensor.double() for tensor in tensors))
    got = norm_projection(*tensors, config=config)
    check_within(got, eager, exact, factor=FORWARD_FACTOR, what="norm and projection")
    got = folded_norm_projection(x, fold(*tensors[1:]), config=config)
    check_within(got, eager, exact, factor=FORWARD_FACTOR, what="with gamma and beta folded into the projection")


def test_a_width_or_a_projection_that_does_not_fit_is_refused():
    x, parameters = torch.zeros(4, 80), (torch.ones(80), torch.ones(80))
    with pytest.raises(ValueError, match="rows of 80 numbers: the kernels take multiples of 64"):
        norm_projection(x, *parameters, torch.zeros(16, 80), None)
    with pytest.raises(ValueError, match=r"weight \[16, 64\] torch.float32: give \[N, C\] and \[P, C\]"):
        norm_projection(x, *parameters, torch.zeros(16, 64), None)
