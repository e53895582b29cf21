"""The product of a gated feed-forward block as an operation of `torch.library`: what torch.compile keeps in its graph
as it is. `gated_kernels` has the kernels.

Sizes: F, the width of value and of gate, which lie side by side.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmattn.kernels.gated_kernels import backward_launch, forward_launch
from mmattn.kernels.plain import is_plain_call
from mmattn.kernels.plans import Plans

_FORWARD = Plans(("joined", "output"))
_BACKWARD = Plans(("grad_output", "joined", "grad_joined"))


def product(joined: Tensor, activation: str) -> Tensor:
    """`gated` without gradients, at the least cost to the processor: plain calls go round the dispatcher."""
    return (_forward if is_plain_call(joined) else gated)(joined, activation)


def gradient(grad_output: Tensor, joined: Tensor, activation: str) -> Tensor:
    """`gated_backward`, in the same way."""
    run = _backward_of if is_plain_call(grad_output, joined) else gated_backward
    return run(grad_output, joined, activation)


@torch.library.custom_op("mmattn::gated", mutates_args=())
def gated(joined: Tensor, activation: str) -> Tensor:
    """The first half of each row times the activation of its second half, `[..., F]`, rounded once.

    Args:
        joined: `[..., 2 F]`, float32, bfloat16 or float16. Copied, unless its last axis is contiguous and the others
            can be taken as one.
        activation: "gelu" (exact) or "silu".
    """
    return _forward(joined, activation)


@torch.library.custom_op("mmattn::gated_backward", mutates_args=())
def gated_backward(grad_output: Tensor, joined: Tensor, activation: str) -> Tensor:
    """The gradient of joined; arguments as in `gated`. It has none itself.

    Args:
        grad_output: `[..., F]`, of joined's dtype.
        joined: `[..., 2 F]`.
        activation: the forward's.
    """
    return _backward_of(grad_output, joined, activation)


def _forward(joined: Tensor, activation: str) -> Tensor:
    output = _empty_output(joined)
    if output.numel() == 0:
        return output
    rows, of_output = _rows(joined), _rows(output)
    _FORWARD.launch(_sizes(activation, rows), (rows, of_output), lambda: (forward_launch(rows, of_output, activation),))
    return output


def _backward_of(grad_output: Tensor, joined: Tensor, activation: str) -> Tensor:
    result = _empty_gradient(joined)
    if result.numel() == 0:
        return result
    of_output, rows, of_result = _rows(grad_output), _rows(joined), _rows(result)
    _BACKWARD.launch(
        _sizes(activation, rows, of_output),
        (of_output, rows, of_result),
        lambda: (backward_launch(of_output, rows, of_result, activation),),
    )
    return result


def _rows(tensor: Tensor) -> Tensor:
    """All axes but the last as one, [R, F]; a copy only where it must be."""
    contiguous = tensor if tensor.stride(-1) == 1 else tensor.contiguous()
    return contiguous.reshape(-1, tensor.shape[-1])


def _sizes(activation: str, rows: Tensor, *others: Tensor) -> tuple[Any, ...]:
    """All that launches depend on."""
    strides = tuple([each.stride(0) for each in (rows, *others)])
    return rows.device, rows.dtype, rows.shape, strides, activation


def _empty_output(joined: Tensor) -> Tensor:
    return joined.new_empty((*joined.shape[:-1], joined.shape[-1] // 2))


def _empty_gradient(joined: Tensor) -> Tensor:
    return joined.new_empty(joined.shape)


@gated.register_fake
def _(joined: Tensor, activation: str) -> Tensor:
    return _empty_output(joined)


@gated_backward.register_fake
def _(grad_output: Tensor, joined: Tensor, activation: str) -> Tensor:
    return _empty_gradient(joined)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    joined, ctx.activation = inputs
    ctx.save_for_backward(joined)


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
    return gated_backward(grad_output, *ctx.saved_tensors, ctx.activation), None


gated.register_autograd(_backward, setup_context=_save)
