from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mmattn.nn import GatedCrossAttention


def make() -> GatedCrossAttention:
    torch.manual_seed(8)
    module = GatedCrossAttention(24, 6, 31, context_dim=17, num_kv_heads=3, activation="swiglu", norm="rms")
    return module.eval()


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor]:
    torch.manual_seed(9)
    return torch.randn(6, 5, 24), torch.randn(3, 7, 17)


@torch.no_grad()
def test_closed_gates_leave_the_input_bit_identical(inputs: tuple[Tensor, Tensor]) -> None:
    x, context = inputs
    assert torch.equal(make()(x, context), x)


@torch.no_grad()
def test_open_gates_follow_the_formula(inputs: tuple[Tensor, Tensor]) -> None:
    module = make().double()
    x, context = (tensor.double() for tensor in inputs)
    module.attn_gate.fill_(0.7)
    module.ffn_gate.fill_(-0.4)
    attended = module.cross_attn(module.cross_attn_norm(x), context)
    middle = x + torch.tanh(torch.tensor(0.7, dtype=torch.float64)) * attended
    expected = middle + torch.tanh(torch.tensor(-0.4, dtype=torch.float64)) * module.ffn(module.ffn_norm(middle))
    torch.testing.assert_close(module(x, context), expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(module(x, module.project_context(context)), expected, rtol=1e-11, atol=1e-11)


@torch.no_grad()
def test_padding_of_the_context_is_not_seen(inputs: tuple[Tensor, Tensor]) -> None:
    module = make().double()
    module.attn_gate.fill_(1.0)
    x, context = (tensor.double() for tensor in inputs)
    context_mask = torch.ones(3, 7, dtype=torch.bool)
    context_mask[:, 4:] = False
    torch.testing.assert_close(module(x, context, context_mask=context_mask), module(x, context[:, :4]))


def test_gates_learn_first(inputs: tuple[Tensor, Tensor]) -> None:
    module = make().train()
    x, context = inputs
    module(x, context).square().sum().backward()
    assert module.attn_gate.grad is not None
    assert module.attn_gate.grad.abs().item() > 0
    assert module.ffn_gate.grad is not None
    assert module.ffn_gate.grad.abs().item() > 0
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in module.parameters())
