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

from mmattn.kernels.plain import is_compiled_call, is_eager_call
from mmattn.ops.triton_missing import triton_missing


@dataclass(frozen=True)
class Gate:
    """An activation's name in `mmattn.kernels.gated`; itself; its backward, `(gradient, input)`; and that into a given
    tensor, `grad_input=`."""

    name: str
    activation: Callable[[Tensor], Tensor]
    backward: Callable[..., Tensor]
    backward_into: Callable[..., Tensor]


GATES = {
    "geglu": Gate("gelu", F.gelu, torch.ops.aten.gelu_backward.default, torch.ops.aten.gelu_backward.grad_input),
    "swiglu": Gate("silu", F.silu, torch.ops.aten.silu_backward.default, torch.ops.aten.silu_backward.grad_input),
}


_DEVICES = ("cpu", "cuda")  # where backwards that write into every other part of a row are known to be right
_KERNEL_DEVICES = ("cuda",)
_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def gated(joined: Tensor, gate: Gate) -> Tensor:
    """The first half of joined `[..., 2 F]` times the activation of its second half, `[..., F]`.

    On a card that runs Triton's kernels one kernel reads and writes every number once, forward and backward, and rounds
    once. Elsewhere eager training writes both gradients where they belong instead of joining them by a copy, and
    computes the activation again instead of keeping it; values and gradients are then the same bits.
    """
    is_eager = joined.device.type in _DEVICES and is_eager_call(joined)
    has_kernel = joined.device.type in _KERNEL_DEVICES and _has_kernel(joined, is_eager)
    if is_eager and torch.is_grad_enabled() and joined.requires_grad:
        return _Gated.apply(joined, gate, has_kernel)  # pyright: ignore[reportReturnType]
    if not has_kernel:
        return _product(joined, gate)
    # Only here, because it needs triton.
    from mmattn.kernels.gated import product

    return product(joined, gate.name)


def _has_kernel(joined: Tensor, is_eager: bool) -> bool:
    if not is_eager and not is_compiled_call(joined):
        return False
    is_served = joined.dtype in _KERNEL_DTYPES and joined.shape[-1] % 2 == 0
    return is_served and triton_missing(joined.device.type) is None


def _product(joined: Tensor, gate: Gate) -> Tensor:
    value, inputs = joined.chunk(2, dim=-1)
    return gate.activation(inputs) * value


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, joined: Tensor, gate: Gate, has_kernel: bool) -> Tensor:
        ctx.save_for_backward(joined)
        ctx.gate, ctx.has_kernel = gate, has_kernel
        if has_kernel:
            from mmattn.kernels.gated import product

            return product(joined, gate.name)
        value, inputs = joined.chunk(2, dim=-1)
        return gate.activation(inputs).mul_(value)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (joined,), (gradient,) = ctx.saved_tensors, grad_outputs
        if torch.is_grad_enabled():  # derivatives of the gradient are wanted too
            output = _product(joined, ctx.gate)
            return torch.autograd.grad(output, joined, gradient, create_graph=True)[0], None, None
        is_eager = is_eager_call(gradient)
        if is_eager and ctx.has_kernel:
            from mmattn.kernels.gated import gradient as kernel_gradient

            return kernel_gradient(gradient, joined, ctx.gate.name), None, None
        value, inputs = joined.chunk(2, dim=-1)
        if not is_eager:  # several gradients at once
            parts = (gradient * ctx.gate.activation(inputs), ctx.gate.backward(gradient * value, inputs))
            return torch.cat(parts, dim=-1), None, None
        result = torch.empty_like(joined)
        of_value, of_inputs = result.chunk(2, dim=-1)
        torch.mul(gradient, ctx.gate.activation(inputs), out=of_value)
        ctx.gate.backward_into(gradient * value, inputs, grad_input=of_inputs)
        return result, None, None
