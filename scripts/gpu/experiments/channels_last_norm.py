"""GroupNorm of pictures in channels-last as an operation with gradients, on the kernels of group_norm_kernels."""

from __future__ import annotations

from typing import Any

import torch
from group_norm_kernels import CONFIGS, Config, Plan, backward_launches, forward_launches
from torch import Tensor
from torch.autograd.function import once_differentiable


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None, groups: int, eps: float,
        has_silu: bool, config: Config,
    ) -> Tensor:  # fmt: skip
        plan, out = Plan.of(x, groups, config), torch.empty_like(x)
        norms = x.new_empty(plan.pictures, 3, plan.width, dtype=torch.float32)
        for launch in forward_launches(plan, x, weight, bias, shift, eps, has_silu, out, norms):
            launch.run(x.device)
        ctx.save_for_backward(x, weight, bias, norms)
        ctx.plan, ctx.has_silu, ctx.shift_dtype = plan, has_silu, None if shift is None else shift.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, weight, bias, norms = ctx.saved_tensors
        plan, out = ctx.plan, torch.empty_like(x)
        totals = torch.empty_like(norms[:, :2], memory_format=torch.contiguous_format)
        grad_shift = None if ctx.shift_dtype is None else x.new_empty(plan.pictures, plan.width, dtype=ctx.shift_dtype)
        grad = grad.contiguous()
        for launch in backward_launches(plan, x, weight, bias, norms, grad, ctx.has_silu, out, totals, grad_shift):
            launch.run(x.device)
        grad_bias, grad_weight = totals.sum(0)
        return out, grad_weight.to(weight.dtype), grad_bias.to(bias.dtype), grad_shift, None, None, None, None


def channels_last_group_norm(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float = 1e-5, *, shift: Tensor | None = None,
    has_silu: bool = True, config: Config = CONFIGS[0],
) -> Tensor:  # fmt: skip
    """`silu(group_norm(x + shift[:, :, None, None], groups, weight, bias, eps))`, with gradients of the first order.

    Args:
        x: [B, C, H, W] in channels-last.
        weight: [C], in any dtype.
        bias: [C].
        groups: C is a multiple of it.
        eps: added to the variance.
        shift: [B, C], contiguous; None: nothing is added.
        has_silu: SiLU after it?
        config: how the kernels are cut up.

    Returns:
        [B, C, H, W] in channels-last, in x's dtype.

    Raises:
        ValueError: x is not in channels-last, or something does not fit it.
    """
    if x.dim() != 4 or not x.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(f"x {list(x.shape)}: give pictures [B, C, H, W] in channels-last")
    count, channels, height, width = x.shape
    if groups < 1 or channels % groups or weight.shape != (channels,) or bias.shape != (channels,):
        raise ValueError(f"{channels} channels, {groups} groups, weight {list(weight.shape)}, bias {list(bias.shape)}")
    if shift is not None and (shift.shape != (count, channels) or not shift.is_contiguous()):
        raise ValueError(f"shift {list(shift.shape)}: give [{count}, {channels}], contiguous")
    rows = x.permute(0, 2, 3, 1).reshape(count, height * width, channels)
    out = _GroupNorm.apply(rows, weight, bias, shift, groups, eps, has_silu, config)
    return out.view(count, height, width, channels).permute(0, 3, 1, 2)
