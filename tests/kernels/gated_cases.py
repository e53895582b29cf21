"""Calls that the kernels of gated feed-forward blocks are held to, on the interpreter and on a card."""

from __future__ import annotations

import torch

from mmattn.nn.gated_activation import GATES, Gate
from tests.ops.cases import generator_for
from tests.tolerance import BACKWARD_FACTOR, FORWARD_FACTOR, check_within

# Whole blocks, rows that are no multiple of a program's, columns of part of a block, sizes of no multiple of 16 bytes.
SHAPES = [(2, 5, 2 * 256), (3, 2 * 320), (7, 2 * 37), (1, 2 * 8), (2 * 5,), (67, 2 * 1), (0, 2 * 8), (3, 0)]
# What activations are curved at, what they vanish or saturate at, and what overflows when it is squared.
GATE_VALUES = (0.0, -0.0, 0.3, -0.7517, 1.7, -2.4, 5.5, -5.5, 13.0, -13.0, 150.0, -150.0)


def product(joined: torch.Tensor, gate: Gate) -> torch.Tensor:
    """By torch's operations."""
    value, inputs = joined.chunk(2, dim=-1)
    return value * gate.activation(inputs)


def draw(shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """(joined, gradient of the output)."""
    generator = generator_for(sum(shape))
    joined = torch.randn(shape, generator=generator) * 2
    gates = joined[..., shape[-1] // 2 :]
    special = torch.tensor(GATE_VALUES)[: gates.shape[-1]]
    if gates.numel() and gates.shape[0] > 1:
        gates[..., : len(special)] = special
    cotangent = torch.randn(*shape[:-1], shape[-1] // 2, generator=generator)
    return joined.to(device, dtype), cotangent.to(device, dtype)


def with_gradient(function, joined, gate, cotangent):
    """(output, gradient of joined)."""
    leaf = joined.detach().requires_grad_()
    output = function(leaf, gate)
    return output.detach(), torch.autograd.grad(output, leaf, cotangent)[0]


def check_gated(function, joined: torch.Tensor, cotangent: torch.Tensor, name: str) -> None:
    """Output and gradient under the tolerance rule."""
    gate = GATES[name]
    got = with_gradient(function, joined, gate, cotangent)
    eager = with_gradient(product, joined, gate, cotangent)
    exact = with_gradient(product, joined.double(), gate, cotangent.double())
    factors = {"output": FORWARD_FACTOR, "gradient": BACKWARD_FACTOR}
    for (what, factor), ours, torchs, want in zip(factors.items(), got, eager, exact, strict=True):
        assert ours.dtype is joined.dtype
        check_within(ours, torchs, want, factor=factor, what=f"{name} {what} of {list(joined.shape)}")
