"""The gate of a joined feed-forward block: the bits of the plain formula, and less kept for the backward pass."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from mmattn.nn.gated_activation import GATES, gated

PASSES = ("forward", "backward")
ACTIVATIONS = {"geglu": F.gelu, "swiglu": F.silu}


def plain(joined: Tensor, name: str) -> Tensor:
    value, gate = joined.chunk(2, dim=-1)
    return ACTIVATIONS[name](gate) * value


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("is_contiguous", [True, False])
def test_values_and_gradients_are_the_formulas_bits(name, dtype, is_contiguous):
    torch.manual_seed(1)
    shape = (3, 11, 2 * 13)
    joined = (
        torch.randn(shape, dtype=dtype) if is_contiguous else torch.randn(2 * 13, 11, 3, dtype=dtype).permute(2, 1, 0)
    )
    joined[0, 0, 0], joined[0, 1, -1] = 60.0, -60.0
    joined.requires_grad_()
    cotangent = torch.randn(11, 3, 13).to(dtype).transpose(0, 1)
    for ours, formula in zip(
        (output := gated(joined, GATES[name]), *torch.autograd.grad(output, joined, cotangent)),
        (output := plain(joined, name), *torch.autograd.grad(output, joined, cotangent)),
        strict=True,
    ):
        assert torch.equal(ours, formula)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_derivatives_of_both_orders_and_transforms(name):
    torch.manual_seed(2)
    joined = torch.randn(3, 2 * 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: gated(x, GATES[name]), joined)
    assert torch.autograd.gradgradcheck(lambda x: gated(x, GATES[name]), joined)
    found = torch.func.vmap(torch.func.grad(lambda x: gated(x, GATES[name]).sum()))(joined.detach())
    torch.testing.assert_close(found, torch.autograd.grad(plain(joined, name).sum(), joined)[0])


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_several_gradients_at_once(name):
    torch.manual_seed(4)
    joined = torch.randn(3, 2 * 5, requires_grad=True)
    cotangents = torch.randn(7, 3, 5)
    found, expected = (
        torch.autograd.grad(output, joined, cotangents, is_grads_batched=True)[0]
        for output in (gated(joined, GATES[name]), plain(joined, name))
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("is_counted", ["forward", "backward"])
def test_checkpointing_with_a_dispatch_mode_around_one_of_the_passes(is_counted):
    joined = torch.randn(3, 2 * 5, requires_grad=True)
    counting = {each: FlopCounterMode(display=False) if each == is_counted else nullcontext() for each in PASSES}
    with counting["forward"]:
        output = checkpoint(lambda x: gated(x, GATES["geglu"]), joined, use_reentrant=False)
    with counting["backward"]:
        output.sum().backward()
    expected = torch.autograd.grad(plain(joined, "geglu").sum(), joined)[0]
    assert torch.equal(joined.grad, expected)


def test_the_input_alone_is_kept():
    kept: list[int] = []
    joined = torch.randn(7, 2 * 11, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda each: kept.append(each.data_ptr()) or each, lambda each: each):
        gated(joined, GATES["geglu"])
    assert kept == [joined.data_ptr()]


def test_nothing_is_kept_without_gradients():
    joined = torch.randn(7, 2 * 11, requires_grad=True)
    with torch.no_grad():
        output = gated(joined, GATES["swiglu"])
    assert output.grad_fn is None
    assert torch.equal(output, plain(joined, "swiglu"))
