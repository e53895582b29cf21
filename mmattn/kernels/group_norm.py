"""GroupNorm of pictures in channels-last as an operation of `torch.library`, which torch.compile keeps in its graph as
it is. `group_norm_kernels` has the kernels.

Shapes: B pictures, C channels, H rows and W columns of pixels.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from mmattn.errors import UsageError
from mmattn.kernels.autograd import differentiated_by, is_plain_backward
from mmattn.kernels.group_norm_launches import Cut, backward_launches, forward_launches, norm_config
from mmattn.kernels.plain import is_plain_call
from mmattn.kernels.plans import Plans

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LAYOUT = torch.channels_last
_FORWARD = Plans(("x", "weight", "bias", "shift", "out", "norms"))
_BACKWARD = Plans(("x", "weight", "bias", "norms", "grad", "grad_x", "grad_weight", "grad_bias", "grad_shift"))
_Results = tuple[Tensor, Tensor]
_Gradients = tuple[Tensor, Tensor, Tensor, Tensor]


def group_norm(
    x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None, num_groups: int, eps: float, has_silu: bool
) -> Tensor:
    """`silu(group_norm(x + shift[:, :, None, None], num_groups, weight, bias, eps))` of pictures in channels-last,
    computed in float32, with gradients of the first order. The same inputs give the same bits, in gradients too.

    Ordinary eager calls go round torch's dispatcher, which costs the processor least.

    Args:
        x: [B, C, H, W] in channels-last, float32, bfloat16 or float16, on a card.
        weight: [C], of any floating point type, as are bias and shift.
        bias: [C].
        shift: [B, C]; None: nothing is added.
        num_groups: C is a multiple of it.
        eps: added to the variance.
        has_silu: SiLU after it?

    Returns:
        [B, C, H, W] in channels-last, in x's dtype.

    Raises:
        UsageError: x is not in channels-last, or something does not fit it.
    """
    _check(x, weight, bias, shift, num_groups)
    inputs = (x, weight, bias, shift, num_groups, eps, has_silu)
    if not is_plain_call(x, weight, bias, shift):
        return group_norm_operation(*inputs)[0]
    leaves = (x, weight, bias) if shift is None else (x, weight, bias, shift)
    if torch.is_grad_enabled() and any([leaf.requires_grad for leaf in leaves]):
        return _apply(*inputs)
    return _forward(*inputs)[0]


def _check(x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None, num_groups: int) -> None:
    if x.dim() != 4 or x.dtype not in DTYPES or not x.is_contiguous(memory_format=_LAYOUT):
        raise UsageError(
            f"x {list(x.shape)} {x.dtype}: give pictures [B, C, H, W] in channels-last, float32, bfloat16 or float16"
        )
    channels = x.shape[1]
    if num_groups < 1 or channels % num_groups or weight.shape != (channels,) or bias.shape != (channels,):
        raise UsageError(
            f"{channels} channels, {num_groups} groups, weight {list(weight.shape)}, bias {list(bias.shape)}: give a "
            f"divisor of the channels, and a number for each of them"
        )
    if shift is not None and shift.shape != x.shape[:2]:
        raise UsageError(f"shift {list(shift.shape)}: give {list(x.shape[:2])}, a number for each picture and channel")
    for name, tensor in (("weight", weight), ("bias", bias), ("shift", shift)):
        if tensor is not None and (tensor.device != x.device or not tensor.is_floating_point()):
            raise UsageError(f"{name} is {tensor.dtype} on {tensor.device}: give floating point numbers on {x.device}")


@torch.library.custom_op("mmattn::group_norm", mutates_args=())
def group_norm_operation(
    x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None, num_groups: int, eps: float, has_silu: bool
) -> tuple[Tensor, Tensor]:
    """What `group_norm` describes.

    Returns:
        (the output, norms float32 [B, 3, C]: what was taken from x, what it was multiplied with, and the sum over
        pixels of what came out, before weight and bias). Gradients flow through the output only.
    """
    return _forward(x, weight, bias, shift, num_groups, eps, has_silu)


@torch.library.custom_op("mmattn::group_norm_backward", mutates_args=())
def group_norm_backward_operation(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    norms: Tensor,
    num_groups: int,
    has_silu: bool,
    shift_dtype: torch.dtype | None,
    wants_x: bool,
    wants_parameters: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias and shift; arguments as in `group_norm`. Those that nobody wants are empty [0].

    Args:
        grad: [B, C, H, W], any strides.
        x: [B, C, H, W].
        weight: [C].
        bias: [C].
        norms: the forward's.
        num_groups: the forward's.
        has_silu: the forward's.
        shift_dtype: of the gradient of shift, None where nobody wants it.
        wants_x: is the gradient of x wanted?
        wants_parameters: those of weight and bias?
    """
    return _backward_of(grad, x, weight, bias, norms, num_groups, has_silu, shift_dtype, wants_x, wants_parameters)


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None, num_groups: int, eps: float, has_silu: bool
) -> _Results:
    out, norms = _outputs(x)
    if x.numel() == 0:
        return out, norms.zero_()
    x, weight, bias = x.contiguous(memory_format=_LAYOUT), weight.contiguous(), bias.contiguous()
    shift = None if shift is None else shift.contiguous()
    config = norm_config()
    _FORWARD.launch(
        (_sizes(x, weight, bias, num_groups, has_silu, config), eps, None if shift is None else shift.dtype),
        (x, weight, bias, shift, out, norms),
        lambda: forward_launches(Cut.of(x, num_groups, config), x, weight, bias, shift, eps, has_silu, out, norms),
    )
    return out, norms


def _backward_of(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, norms: Tensor, *rest: Any) -> _Gradients:
    num_groups, has_silu, shift_dtype, wants_x, wants_parameters = rest
    gradients = _empty_gradients(x, weight, bias, shift_dtype, wants_x, wants_parameters)
    if x.numel() == 0:
        for gradient in gradients:
            gradient.zero_()
        return gradients
    grad, x = grad.contiguous(memory_format=_LAYOUT), x.contiguous(memory_format=_LAYOUT)
    weight, bias, norms = weight.contiguous(), bias.contiguous(), norms.contiguous()
    is_wanted = (wants_x, wants_parameters, wants_parameters, shift_dtype is not None)
    grad_x, grad_weight, grad_bias, grad_shift = (
        gradient if wants else None for gradient, wants in zip(gradients, is_wanted, strict=True)
    )
    config = norm_config()

    def make() -> tuple[Any, ...]:
        cut = Cut.of(x, num_groups, config)
        parameters = None if grad_weight is None or grad_bias is None else (grad_weight, grad_bias)
        return backward_launches(cut, x, weight, bias, norms, grad, has_silu, grad_x, parameters, grad_shift)

    _BACKWARD.launch(
        (_sizes(x, weight, bias, num_groups, has_silu, config), grad.dtype, shift_dtype, wants_x, wants_parameters),
        (x, weight, bias, norms, grad, grad_x, grad_weight, grad_bias, grad_shift),
        make,
    )
    return gradients


def _sizes(x: Tensor, weight: Tensor, bias: Tensor, *options: Hashable) -> Hashable:
    """All that launches of both passes depend on."""
    return x.device, x.dtype, x.shape, weight.dtype, bias.dtype, options


def _outputs(x: Tensor) -> _Results:
    norms = torch.empty((x.shape[0], 3, x.shape[1]), dtype=torch.float32, device=x.device)
    return _pictures_like(x), norms


def _empty_gradients(
    x: Tensor, weight: Tensor, bias: Tensor, shift_dtype: torch.dtype | None, wants_x: bool, wants_parameters: bool
) -> _Gradients:
    grad_x = _pictures_like(x) if wants_x else x.new_empty(0)
    num_parameters = x.shape[1] if wants_parameters else 0
    grad_shift = x.new_empty(0) if shift_dtype is None else x.new_empty(x.shape[:2], dtype=shift_dtype)
    return grad_x, weight.new_empty(num_parameters), bias.new_empty(num_parameters), grad_shift


def _pictures_like(x: Tensor) -> Tensor:
    """In channels-last, whatever strides x has where an axis is 1."""
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=_LAYOUT)


@group_norm_operation.register_fake
def _(x: Tensor, *_: Any) -> _Results:
    return _outputs(x)


@group_norm_backward_operation.register_fake
def _(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, norms: Tensor, num_groups: int, has_silu: bool,
    shift_dtype: torch.dtype | None, wants_x: bool, wants_parameters: bool,
) -> _Gradients:  # fmt: skip
    return _empty_gradients(x, weight, bias, shift_dtype, wants_x, wants_parameters)


def _save(ctx: Any, inputs: tuple[Any, ...], results: _Results) -> None:
    x, weight, bias, shift, num_groups, _, has_silu = inputs
    ctx.save_for_backward(x, weight, bias, results[1])
    ctx.options = (num_groups, has_silu, None if shift is None else shift.dtype)


def _run_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, norms = saved = ctx.saved_tensors
    num_groups, has_silu, shift_dtype = ctx.options
    wants_x, wants_weight, wants_bias, wants_shift = wanted = ctx.needs_input_grad[:4]
    what = (shift_dtype if wants_shift else None, wants_x, wants_weight or wants_bias)
    run = _backward_of if is_plain_backward(grad, *saved) else group_norm_backward_operation
    gradients = run(grad, x, weight, bias, norms, num_groups, has_silu, *what)
    return (*[each if wants else None for each, wants in zip(gradients, wanted, strict=True)], None, None, None)


_apply = differentiated_by(group_norm_operation, _forward, _save, _run_backward)
