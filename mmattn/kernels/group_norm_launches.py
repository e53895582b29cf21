"""How kernels of `group_norm_kernels` are cut up and launched.

Shapes: B pictures, P pixels, C channels, S shares of a picture's pixels.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmattn.kernels.group_norm_kernels import (
    norm_apply_kernel,
    norm_grad_kernel,
    norm_grad_sums_kernel,
    norm_group_grads_kernel,
    norm_groups_kernel,
    norm_moments_kernel,
    norm_parameters_kernel,
)
from mmattn.kernels.launch import Launch, card_of
from mmattn.kernels.tiles import ceil_div, power_of_two


class Config(NamedTuple):
    """Pixels and channels of a block, and a program's warps."""

    rows: int
    columns: int
    num_warps: int


CONFIGS = (Config(32, 64, 4), Config(16, 128, 4), Config(64, 64, 8))
# Of those that walk over pixels, so many are wanted on each multiprocessor.
_PROGRAMS_A_PROCESSOR = 8
# Blocks of a walk that are in flight or worked on.
_STAGES = 3
# Of shares times channels of a group, how many a warp holds at most, and a program's most warps.
_NUMBERS_A_WARP = 512
_MOST_WARPS = 4
_PARAMETERS = Config(64, 16, 4)


def norm_config() -> Config:
    """The fastest of those that were tried on an H200."""
    return CONFIGS[0]


class Cut(NamedTuple):
    """How a call is cut up."""

    pictures: int
    num_pixels: int
    width: int
    group: int
    config: Config
    num_shares: int

    @classmethod
    def of(cls, x: Tensor, num_groups: int, config: Config) -> Cut:
        """For pictures [B, C, H, W]: as many shares as keep the card busy, all but the last of whole blocks."""
        pictures, width, *sides = x.shape
        num_pixels = sides[0] * sides[1]
        programs = pictures * ceil_div(width, config.columns)
        wanted = ceil_div(_PROGRAMS_A_PROCESSOR * card_of(x.device).processors, programs)
        blocks = ceil_div(num_pixels, config.rows)
        num_shares = ceil_div(blocks, ceil_div(blocks, wanted))
        return cls(pictures, num_pixels, width, width // num_groups, config, num_shares)

    @property
    def per_share(self) -> int:
        blocks = ceil_div(self.num_pixels, self.config.rows)
        return ceil_div(blocks, self.num_shares) * self.config.rows

    def walking(self, kernel: object, **arguments: object) -> Launch:
        """Programs that walk over a share."""
        return self._by_pixel(kernel, self.num_shares, arguments | {"per_share": self.per_share, "STAGES": _STAGES})

    def each_block(self, kernel: object, **arguments: object) -> Launch:
        """A program for each block of pixels."""
        return self._by_pixel(kernel, ceil_div(self.num_pixels, self.config.rows), arguments)

    def _by_pixel(self, kernel: object, num_shares: int, arguments: dict[str, object]) -> Launch:
        num_blocks = ceil_div(self.width, self.config.columns)
        arguments = arguments | dict(
            num_pixels=self.num_pixels, num_shares=num_shares, num_blocks=num_blocks,
            WIDTH=self.width, ROWS=self.config.rows, COLUMNS=self.config.columns,
        )  # fmt: skip
        return Launch(kernel, self.pictures * num_shares * num_blocks, arguments, self.config.num_warps, 1)

    def each_group(self, kernel: object, has_shift: bool, **arguments: object) -> Launch:
        """A program for each picture and group."""
        size = power_of_two(self.group)
        shares = min(power_of_two(self.num_shares), max(1, _MOST_WARPS * _NUMBERS_A_WARP // size))
        arguments = arguments | dict(
            num_pixels=self.num_pixels, num_shares=self.num_shares, HAS_SHIFT=has_shift, WIDTH=self.width,
            GROUP=self.group, SHARES=shares, SIZE=size,
        )  # fmt: skip
        num_warps = min(_MOST_WARPS, max(1, shares * size // _NUMBERS_A_WARP))
        return Launch(kernel, self.pictures * (self.width // self.group), arguments, num_warps, 1)

    def each_channel(self, kernel: object, **arguments: object) -> Launch:
        """Programs that walk over all shares of all pictures."""
        rows, columns, num_warps = _PARAMETERS
        arguments = arguments | dict(
            num_rows=self.pictures * self.num_shares, WIDTH=self.width, ROWS=rows, COLUMNS=columns, STAGES=_STAGES
        )
        return Launch(kernel, ceil_div(self.width, columns), arguments, num_warps, 1)


def forward_launches(
    cut: Cut, x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None, eps: float, has_silu: bool, out: Tensor,
    norms: Tensor,
) -> tuple[Launch, ...]:  # fmt: skip
    """What fills `out` [B, C, H, W] and `norms` [B, 3, C], in order; nothing is empty, x and out are channels-last."""
    moments = x.new_empty((cut.pictures, cut.num_shares, 2, cut.width), dtype=torch.float32)
    given = {"shift_ptr": x if shift is None else shift, "per_share": cut.per_share, "eps": eps}
    parameters = {"weight_ptr": weight, "bias_ptr": bias, "norms_ptr": norms, "HAS_SILU": has_silu}
    return (
        cut.walking(norm_moments_kernel, x_ptr=x, moments_ptr=moments),
        cut.each_group(norm_groups_kernel, shift is not None, moments_ptr=moments, norms_ptr=norms, **given),
        cut.each_block(norm_apply_kernel, x_ptr=x, out_ptr=out, **parameters),
    )


def backward_launches(
    cut: Cut, x: Tensor, weight: Tensor, bias: Tensor, norms: Tensor, grad: Tensor, has_silu: bool,
    grad_x: Tensor | None, parameters: tuple[Tensor, Tensor] | None, grad_shift: Tensor | None,
) -> tuple[Launch, ...]:  # fmt: skip
    """What fills `grad_x` [B, C, H, W], `parameters` (gradients [C] of weight and bias) and `grad_shift` [B, C], in
    order; those that are None nobody wants."""
    sums = x.new_empty((cut.pictures, cut.num_shares, 2, cut.width), dtype=torch.float32)
    through = x.new_empty((cut.pictures, 2, cut.width), dtype=torch.float32)
    inputs: dict[str, Any] = {
        "x_ptr": x, "norms_ptr": norms, "weight_ptr": weight, "bias_ptr": bias, "grad_ptr": grad, "HAS_SILU": has_silu,
    }  # fmt: skip
    group = {"sums_ptr": sums, "norms_ptr": norms, "weight_ptr": weight, "through_ptr": through}
    group["grad_shift_ptr"] = x if grad_shift is None else grad_shift
    launches = [cut.walking(norm_grad_sums_kernel, sums_ptr=sums, **inputs)]
    if grad_x is not None or grad_shift is not None:
        launches.append(cut.each_group(norm_group_grads_kernel, grad_shift is not None, **group))
    if grad_x is not None:
        launches.append(cut.each_block(norm_grad_kernel, through_ptr=through, grad_x_ptr=grad_x, **inputs))
    if parameters is not None:
        grads = dict(zip(("grad_weight_ptr", "grad_bias_ptr"), parameters, strict=True))
        launches.append(cut.each_channel(norm_parameters_kernel, sums_ptr=sums, **grads))
    return tuple(launches)
