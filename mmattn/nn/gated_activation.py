"""The product of a gated feed-forward block, value * act(gate), with a backward pass that keeps and moves less.

Sizes: F, the width of value and of gate, which lie side by side.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmattn.kernels.plain import is_eager_call


@dataclass(frozen=True)
class Gate:
    """An activation; its backward, `(gradient, input)`; and that into a given tensor, `grad_input=`."""

    activation: Callable[[Tensor], Tensor]
    backward: Callable[..., Tensor]
    backward_into: Callable[..., Tensor]


GATES = {
    "geglu": Gate(F.gelu, torch.ops.aten.gelu_backward.default, torch.ops.aten.gelu_backward.grad_input),
    "swiglu": Gate(F.silu, torch.ops.aten.silu_backward.default, torch.ops.aten.silu_backward.grad_input),
}


_DEVICES = ("cpu", "cuda")  # where backwards that write into every other part of a row are known to be right


def gated(joined: Tensor, gate: Gate) -> Tensor:
    """The first half of joined `[..., 2 F]` times the activation of its second half, `[..., F]`.

    In eager training both gradients are written where they belong instead of being joined by a copy, and the
    activation is computed again instead of being kept; values and gradients are the same bits.
    """
    is_trained = torch.is_grad_enabled() and joined.requires_grad
    if is_trained and joined.device.type in _DEVICES and is_eager_call(joined):
        return _Gated.apply(joined, gate)  # pyright: ignore[reportReturnType]
    return _product(joined, gate)


def _product(joined: Tensor, gate: Gate) -> Tensor:
    value, inputs = joined.chunk(2, dim=-1)
    return gate.activation(inputs) * value


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, joined: Tensor, gate: Gate) -> Tensor:
        ctx.save_for_backward(joined)
        ctx.gate = gate
        value, inputs = joined.chunk(2, dim=-1)
        return gate.activation(inputs).mul_(value)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        (joined,), (gradient,) = ctx.saved_tensors, grad_outputs
        if torch.is_grad_enabled():  # derivatives of the gradient are wanted too
            output = _product(joined, ctx.gate)
            return torch.autograd.grad(output, joined, gradient, create_graph=True)[0], None
        value, inputs = joined.chunk(2, dim=-1)
        if not is_eager_call(gradient):  # several gradients at once
            parts = (gradient * ctx.gate.activation(inputs), ctx.gate.backward(gradient * value, inputs))
            return torch.cat(parts, dim=-1), None
        result = torch.empty_like(joined)
        of_value, of_inputs = result.chunk(2, dim=-1)
        torch.mul(gradient, ctx.gate.activation(inputs), out=of_value)
        ctx.gate.backward_into(gradient * value, inputs, grad_input=of_inputs)
        return result, None
