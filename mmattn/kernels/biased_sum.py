"""The sum of two pictures in channels-last and a bias of each channel, in one pass: what a convolution and what went
past it come to. An operation of `torch.library`, which torch.compile keeps in its graph as it is.

Sizes: B pictures, C channels, N = B * H * W places.
"""

# What Triton compiles is not what it looks like to a type checker.
# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmattn.kernels.launch import Launch
from mmattn.kernels.plain import is_plain_call
from mmattn.kernels.plans import Plans
from mmattn.kernels.tiles import ceil_div

_NUMBERS = 2048
_NUM_WARPS = 4
_PLANS = Plans(("first", "second", "bias", "output"), ("num_numbers",))


@triton.jit(do_not_specialize=("num_numbers",))
def biased_sum_kernel(
    first_ptr, second_ptr, bias_ptr, output_ptr, num_numbers, WIDTH: tl.constexpr, NUMBERS: tl.constexpr
):  # fmt: skip
    """output [N, C] of a program's numbers, added in float32 and rounded once."""
    numbers = tl.program_id(0).to(tl.int64) * NUMBERS + tl.arange(0, NUMBERS)
    is_there = numbers < num_numbers
    first = tl.load(first_ptr + numbers, mask=is_there, other=0.0).to(tl.float32)
    second = tl.load(second_ptr + numbers, mask=is_there, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + numbers % WIDTH, mask=is_there, other=0.0).to(tl.float32)
    tl.store(output_ptr + numbers, (first + second + bias).to(output_ptr.dtype.element_ty), mask=is_there)


def biased_sum(first: Tensor, second: Tensor, bias: Tensor) -> Tensor:
    """first + second + bias[:, None, None].

    Args:
        first: [B, C, H, W] in channels-last; float32, bfloat16 or float16.
        second: the same, of the same dtype.
        bias: [C], of any of them.

    Returns:
        [B, C, H, W] in channels-last, in first's dtype. All three have gradients.
    """
    if not is_plain_call(first, second, bias):
        return biased_sum_operation(first, second, bias)
    if torch.is_grad_enabled() and (first.requires_grad or second.requires_grad or bias.requires_grad):
        return _Sum.apply(first, second, bias)  # pyright: ignore[reportReturnType]
    return _run(first, second, bias)


@torch.library.custom_op("mmattn::biased_sum", mutates_args=())
def biased_sum_operation(first: Tensor, second: Tensor, bias: Tensor) -> Tensor:
    """`biased_sum`, through torch's dispatcher."""
    return _run(first, second, bias)


@biased_sum_operation.register_fake
def _(first: Tensor, second: Tensor, bias: Tensor) -> Tensor:
    return torch.empty_like(first, memory_format=torch.channels_last)


def launch_of(first: Tensor, second: Tensor, bias: Tensor, output: Tensor) -> Launch:
    """The launch that fills `output`: all of them in channels-last, not empty."""
    arguments = dict(
        first_ptr=first,
        second_ptr=second,
        bias_ptr=bias,
        output_ptr=output,
        num_numbers=first.numel(),
        WIDTH=first.shape[1],
        NUMBERS=_NUMBERS,
    )
    return Launch(biased_sum_kernel, ceil_div(first.numel(), _NUMBERS), arguments, _NUM_WARPS, 1)


def _run(first: Tensor, second: Tensor, bias: Tensor) -> Tensor:
    first, second = (each.contiguous(memory_format=torch.channels_last) for each in (first, second))
    output = torch.empty_like(first, memory_format=torch.channels_last)
    count = output.numel()
    if count:
        own = bias.contiguous()
        sizes = (first.device, first.dtype, own.dtype, first.shape[1], ceil_div(count, _NUMBERS))
        _PLANS.launch(sizes, (first, second, own, output), lambda: (launch_of(first, second, own, output),), (count,))
    return output


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.bias_dtype = inputs[2].dtype


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    wants_bias = ctx.needs_input_grad[2]
    return grad_output, grad_output, grad_output.sum((0, 2, 3)).to(ctx.bias_dtype) if wants_bias else None


biased_sum_operation.register_autograd(_backward, setup_context=_save)


class _Sum(torch.autograd.Function):
    """The rule for calls that go round the dispatcher."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        output = _run(*inputs)
        _save(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _backward(ctx, grad_output)
