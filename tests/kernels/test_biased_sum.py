"""Pictures and a bias added in one pass, on Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from mmattn.kernels.biased_sum import biased_sum, biased_sum_operation
from mmattn.models.unet.pictures import channels_last

pytestmark = pytest.mark.interpreter


def inputs(sizes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    draws = torch.Generator().manual_seed(sum(sizes))
    first, second = (channels_last(torch.randn(*sizes, generator=draws)).to(dtype) for _ in range(2))
    return first, second, torch.randn(sizes[1], generator=draws)


@pytest.mark.parametrize("sizes", [(2, 5, 3, 7), (1, 1, 1, 1), (3, 320, 5, 3), (0, 4, 2, 2), (1, 7, 13, 17)], ids=str)
def test_sum_and_gradients(sizes: tuple[int, ...]) -> None:
    given = [each.requires_grad_() for each in inputs(sizes)]
    found, wanted = biased_sum(*given), given[0] + given[1] + given[2][:, None, None]
    assert found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found, wanted)
    cotangent = torch.randn(sizes, generator=torch.Generator().manual_seed(1))
    for got, exact in zip(*(torch.autograd.grad(each, given, cotangent) for each in (found, wanted)), strict=True):
        torch.testing.assert_close(got, exact)


def test_half_types_are_rounded_once() -> None:
    first, second, bias = inputs((2, 11, 3, 5), torch.float16)
    exact = first.double() + second.double() + bias.double()[:, None, None]
    found = biased_sum(first, second, bias)
    assert found.dtype is torch.float16
    assert (found.double() - exact).abs().max() <= exact.abs().max() * torch.finfo(torch.float16).eps / 2


def test_other_layouts_and_frozen_biases() -> None:
    first, second, bias = inputs((2, 6, 3, 5))
    found = biased_sum(first.contiguous().requires_grad_(), second[..., ::1].contiguous(), bias)
    torch.testing.assert_close(found, first + second + bias[:, None, None])
    found.sum().backward()
    assert bias.grad is None


def test_operation() -> None:
    given = [each.requires_grad_() for each in inputs((2, 5, 3, 7))]
    torch.library.opcheck(biased_sum_operation, tuple(given))
    run = torch.compile(lambda *tensors: biased_sum(*tensors) * 2, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(*given), 2 * biased_sum(*given))


def test_second_derivatives() -> None:
    first, second, bias = (each.requires_grad_() for each in inputs((1, 3, 2, 2)))
    (grad,) = torch.autograd.grad((biased_sum(first, second, bias) ** 2).sum(), bias, create_graph=True)
    grad.sum().backward()
    torch.testing.assert_close(first.grad, torch.full_like(first, 2.0))
