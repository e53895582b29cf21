"""GroupNorm (arXiv 1803.08494) of pictures in channels-last, with what a U-Net's ResNets have about it: a number for
each picture and channel added before (the time embedding), SiLU after.

The pictures are read once for their moments and once to be normalised; backward, read with the gradient for the sums
over pixels, and once more for their own gradient. Everything in between, which stock keeps in float32 under autocast,
is in registers. No atomics: the same inputs give the same bits.

Shapes: B pictures, P pixels, C channels, G groups, S shares of a picture's pixels.
"""

# What Triton compiles is not what it looks like to a type checker.
# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportReturnType=false
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

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
# Of shares times channels of a group, which one program holds.
_NUMBERS_A_WARP = 512
# One compiled kernel serves all their values.
_VARYING = ("num_pixels", "per_share", "num_shares", "num_blocks")


@triton.jit
def place(num_blocks, num_shares, COLUMNS: tl.constexpr):
    """(channels of this program, share, picture). Channels first: programs that run together read whole pixels."""
    program = tl.program_id(0)
    rest = program // num_blocks
    return (
        (program % num_blocks) * COLUMNS + tl.arange(0, COLUMNS),
        rest % num_shares,
        (rest // num_shares).to(tl.int64),
    )


@triton.jit
def of_channels(base, columns, WIDTH: tl.constexpr):
    """A number for each channel [N], in float32."""
    return tl.load(base + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)


@triton.jit
def pixels(base, rows, end, columns, WIDTH: tl.constexpr):
    """Numbers [M, N] in float32, zeros outside."""
    is_inside = (rows < end)[:, None] & (columns < WIDTH)[None, :]
    return tl.load(base + rows[:, None] * WIDTH + columns[None, :], mask=is_inside, other=0.0).to(tl.float32)


@triton.jit
def put_pixels(base, block, rows, end, columns, WIDTH: tl.constexpr):
    """Write what `pixels` would read."""
    is_inside = (rows < end)[:, None] & (columns < WIDTH)[None, :]
    pointers = base + rows[:, None] * WIDTH + columns[None, :]
    tl.store(pointers, block.to(base.dtype.element_ty), mask=is_inside)


@triton.jit
def put_pair(pairs_ptr, number, first, second, columns, WIDTH: tl.constexpr):
    """Write two numbers for each channel as the `number`-th pair of rows [2, C]."""
    base = pairs_ptr + number * 2 * WIDTH + columns
    tl.store(base, first, mask=columns < WIDTH)
    tl.store(base + WIDTH, second, mask=columns < WIDTH)


@triton.jit(do_not_specialize=_VARYING)
def moments_kernel(
    x_ptr, moments_ptr, num_pixels, per_share, num_shares, num_blocks,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """moments [B, S, 2, C] of x [B, P, C]: the mean of a share's pixels, and their squared distances from it, summed.
    Blocks are added by the formula for two samples (Chan, Golub, LeVeque 1983): no difference of large squares."""
    columns, share, picture = place(num_blocks, num_shares, COLUMNS)
    base = x_ptr + picture * num_pixels * WIDTH
    begin = share * per_share
    end = tl.minimum(begin + per_share, num_pixels)
    mean = tl.full([COLUMNS], 0.0, dtype=tl.float32)
    squares = tl.full([COLUMNS], 0.0, dtype=tl.float32)
    for start in tl.range(begin, end, ROWS):
        rows = start + tl.arange(0, ROWS)
        count = tl.minimum(end - start, ROWS).to(tl.float32)
        seen = (start - begin).to(tl.float32)
        x = pixels(base, rows, end, columns, WIDTH)
        block_mean = tl.sum(x, 0) / count
        centred = tl.where((rows < end)[:, None], x - block_mean[None, :], 0.0)
        distance = block_mean - mean
        mean += distance * (count / (seen + count))
        squares += tl.sum(centred * centred, 0) + distance * distance * (seen * count / (seen + count))
    put_pair(moments_ptr, picture * num_shares + share, mean, squares, columns, WIDTH)


@triton.jit
def shares_of_group(pairs_ptr, which, num_shares, WIDTH: tl.constexpr, GROUP: tl.constexpr, SHARES: tl.constexpr,
                    SIZE: tl.constexpr):  # fmt: skip
    """One of each pair [S, channels of a group] of this program's picture and group."""
    shares = tl.arange(0, SHARES)
    inside = tl.arange(0, SIZE)
    picture = (tl.program_id(0) // (WIDTH // GROUP)).to(tl.int64)
    columns = tl.program_id(0) % (WIDTH // GROUP) * GROUP + inside
    pointers = pairs_ptr + ((picture * num_shares + shares) * 2 + which)[:, None] * WIDTH + columns[None, :]
    return tl.load(pointers, mask=(shares < num_shares)[:, None] & (inside < GROUP)[None, :], other=0.0)


@triton.jit
def channels_of_group(WIDTH: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr):
    """(picture, channels, which of them there are) of this program's group."""
    inside = tl.arange(0, SIZE)
    columns = tl.program_id(0) % (WIDTH // GROUP) * GROUP + inside
    return (tl.program_id(0) // (WIDTH // GROUP)).to(tl.int64), columns, inside < GROUP


@triton.jit(do_not_specialize=_VARYING)
def group_moments_kernel(
    moments_ptr, shift_ptr, norms_ptr, num_pixels, per_share, num_shares, eps,
    HAS_SHIFT: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr, SHARES: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """norms [B, 3, C]: what to take from x, what to multiply with, and the sum over pixels of what comes out."""
    picture, columns, is_channel = channels_of_group(WIDTH, GROUP, SIZE)
    means = shares_of_group(moments_ptr, 0, num_shares, WIDTH, GROUP, SHARES, SIZE)
    squares = shares_of_group(moments_ptr, 1, num_shares, WIDTH, GROUP, SHARES, SIZE)
    shares = tl.arange(0, SHARES)
    counts = tl.where(shares < num_shares, tl.minimum(num_pixels - shares * per_share, per_share), 0).to(tl.float32)
    shift = tl.full([SIZE], 0.0, dtype=tl.float32)
    if HAS_SHIFT:
        shift = tl.load(shift_ptr + picture * WIDTH + columns, mask=is_channel, other=0.0).to(tl.float32)
    num_pixels = num_pixels.to(tl.float32)
    channel_mean = tl.sum(means * counts[:, None], 0) / num_pixels + shift
    mean = tl.sum(channel_mean, 0) / GROUP
    distance = tl.where(is_channel[None, :], means + shift[None, :] - mean, 0.0)
    variance = tl.sum(tl.sum(squares + distance * distance * counts[:, None], 1), 0) / (num_pixels * GROUP)
    scale = 1.0 / tl.sqrt(variance + eps)
    base = norms_ptr + picture * 3 * WIDTH + columns
    tl.store(base, mean - shift, mask=is_channel)
    tl.store(base + WIDTH, tl.full([SIZE], 0.0, dtype=tl.float32) + scale, mask=is_channel)
    tl.store(base + 2 * WIDTH, (channel_mean - mean) * scale * num_pixels, mask=is_channel)


@triton.jit
def normed(x, norms_ptr, picture, columns, WIDTH: tl.constexpr):
    """x [M, N] without the mean, divided by the deviation."""
    base = norms_ptr + picture * 3 * WIDTH
    return (x - of_channels(base, columns, WIDTH)[None, :]) * of_channels(base + WIDTH, columns, WIDTH)[None, :]


@triton.jit(do_not_specialize=_VARYING)
def apply_kernel(
    x_ptr, norms_ptr, weight_ptr, bias_ptr, out_ptr, num_pixels, num_shares, num_blocks,
    HAS_SILU: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out [B, P, C]: a share is a block of pixels here."""
    columns, share, picture = place(num_blocks, num_shares, COLUMNS)
    rows = share * ROWS + tl.arange(0, ROWS)
    first = picture * num_pixels * WIDTH
    x = normed(pixels(x_ptr + first, rows, num_pixels, columns, WIDTH), norms_ptr, picture, columns, WIDTH)
    out = x * of_channels(weight_ptr, columns, WIDTH)[None, :] + of_channels(bias_ptr, columns, WIDTH)[None, :]
    if HAS_SILU:
        out = out * tl.sigmoid(out)
    put_pixels(out_ptr + first, out, rows, num_pixels, columns, WIDTH)


@triton.jit
def normed_and_grad(
    x_ptr, norms_ptr, weight_ptr, bias_ptr, grad_ptr, picture, rows, end, columns, num_pixels,
    HAS_SILU: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """(x normed, gradient before SiLU), both [M, N]."""
    first = picture * num_pixels * WIDTH
    x = normed(pixels(x_ptr + first, rows, end, columns, WIDTH), norms_ptr, picture, columns, WIDTH)
    grad = pixels(grad_ptr + first, rows, end, columns, WIDTH)
    if HAS_SILU:
        out = x * of_channels(weight_ptr, columns, WIDTH)[None, :] + of_channels(bias_ptr, columns, WIDTH)[None, :]
        opened = tl.sigmoid(out)
        grad = grad * opened * (1.0 + out * (1.0 - opened))
    return x, grad


@triton.jit(do_not_specialize=_VARYING)
def grad_sums_kernel(
    x_ptr, norms_ptr, weight_ptr, bias_ptr, grad_ptr, sums_ptr, num_pixels, per_share, num_shares, num_blocks,
    HAS_SILU: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """sums [B, S, 2, C] over a share's pixels: of the gradient before SiLU, and of it times x normed."""
    columns, share, picture = place(num_blocks, num_shares, COLUMNS)
    begin = share * per_share
    end = tl.minimum(begin + per_share, num_pixels)
    plain = tl.full([COLUMNS], 0.0, dtype=tl.float32)
    weighted = tl.full([COLUMNS], 0.0, dtype=tl.float32)
    for start in tl.range(begin, end, ROWS):
        rows = start + tl.arange(0, ROWS)
        x, grad = normed_and_grad(
            x_ptr, norms_ptr, weight_ptr, bias_ptr, grad_ptr, picture, rows, end, columns, num_pixels, HAS_SILU, WIDTH
        )  # fmt: skip
        plain += tl.sum(grad, 0)
        weighted += tl.sum(grad * x, 0)
    put_pair(sums_ptr, picture * num_shares + share, plain, weighted, columns, WIDTH)


@triton.jit(do_not_specialize=_VARYING)
def group_grads_kernel(
    sums_ptr, norms_ptr, weight_ptr, totals_ptr, means_ptr, grad_shift_ptr, num_pixels, num_shares,
    HAS_SHIFT: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr, SHARES: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """totals [B, 2, C]: the sums of all shares; means [B, 2, C]: those of a group's numbers, of what flows through the
    mean and through the deviation; grad_shift [B, C]."""
    picture, columns, is_channel = channels_of_group(WIDTH, GROUP, SIZE)
    plain = tl.sum(shares_of_group(sums_ptr, 0, num_shares, WIDTH, GROUP, SHARES, SIZE), 0)
    weighted = tl.sum(shares_of_group(sums_ptr, 1, num_shares, WIDTH, GROUP, SHARES, SIZE), 0)
    weight = tl.load(weight_ptr + columns, mask=is_channel, other=0.0).to(tl.float32)
    num_pixels = num_pixels.to(tl.float32)
    by_mean = tl.sum(weight * plain, 0) / (num_pixels * GROUP)
    by_scale = tl.sum(weight * weighted, 0) / (num_pixels * GROUP)
    pair = picture * 2 * WIDTH + columns
    tl.store(totals_ptr + pair, plain, mask=is_channel)
    tl.store(totals_ptr + pair + WIDTH, weighted, mask=is_channel)
    everywhere = tl.full([SIZE], 0.0, dtype=tl.float32)
    tl.store(means_ptr + pair, everywhere + by_mean, mask=is_channel)
    tl.store(means_ptr + pair + WIDTH, everywhere + by_scale, mask=is_channel)
    if HAS_SHIFT:
        norms = norms_ptr + picture * 3 * WIDTH + columns
        scale = tl.load(norms + WIDTH, mask=is_channel, other=0.0)
        total = tl.load(norms + 2 * WIDTH, mask=is_channel, other=0.0)
        grad = scale * (weight * plain - num_pixels * by_mean - by_scale * total)
        pointers = grad_shift_ptr + picture * WIDTH + columns
        tl.store(pointers, grad.to(grad_shift_ptr.dtype.element_ty), mask=is_channel)


@triton.jit(do_not_specialize=_VARYING)
def grad_kernel(
    x_ptr, norms_ptr, weight_ptr, bias_ptr, grad_ptr, means_ptr, out_ptr, num_pixels, num_shares, num_blocks,
    HAS_SILU: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The gradient [B, P, C] of x: a share is a block of pixels here."""
    columns, share, picture = place(num_blocks, num_shares, COLUMNS)
    rows = share * ROWS + tl.arange(0, ROWS)
    x, grad = normed_and_grad(
        x_ptr, norms_ptr, weight_ptr, bias_ptr, grad_ptr, picture, rows, num_pixels, columns, num_pixels,
        HAS_SILU, WIDTH,
    )  # fmt: skip
    means = means_ptr + picture * 2 * WIDTH
    through = of_channels(means, columns, WIDTH)[None, :] + x * of_channels(means + WIDTH, columns, WIDTH)[None, :]
    scale = of_channels(norms_ptr + picture * 3 * WIDTH + WIDTH, columns, WIDTH)
    out = scale[None, :] * (grad * of_channels(weight_ptr, columns, WIDTH)[None, :] - through)
    put_pixels(out_ptr + picture * num_pixels * WIDTH, out, rows, num_pixels, columns, WIDTH)


class Plan(NamedTuple):
    """How a call is cut up."""

    pictures: int
    num_pixels: int
    width: int
    group: int
    config: Config
    num_shares: int

    @classmethod
    def of(cls, x: Tensor, groups: int, config: Config) -> Plan:
        """For rows [B, P, C]: as many shares as keep the card busy, all but the last of whole blocks."""
        pictures, num_pixels, width = x.shape
        wanted = ceil_div(
            _PROGRAMS_A_PROCESSOR * card_of(x.device).processors, pictures * ceil_div(width, config.columns)
        )
        blocks = ceil_div(num_pixels, config.rows)
        return cls(pictures, num_pixels, width, width // groups, config, ceil_div(blocks, ceil_div(blocks, wanted)))

    @property
    def per_share(self) -> int:
        blocks = ceil_div(self.num_pixels, self.config.rows)
        return ceil_div(blocks, self.num_shares) * self.config.rows

    def walking(self, kernel: object, **arguments: object) -> Launch:
        """Programs that walk over a share."""
        return self._by_pixel(kernel, self.num_shares, arguments | {"per_share": self.per_share}, num_stages=2)

    def each_block(self, kernel: object, **arguments: object) -> Launch:
        """A program for each block of pixels."""
        return self._by_pixel(kernel, ceil_div(self.num_pixels, self.config.rows), arguments, num_stages=1)

    def _by_pixel(self, kernel: object, shares: int, arguments: dict[str, object], num_stages: int) -> Launch:
        num_blocks = ceil_div(self.width, self.config.columns)
        arguments = arguments | dict(
            num_pixels=self.num_pixels, num_shares=shares, num_blocks=num_blocks,
            WIDTH=self.width, ROWS=self.config.rows, COLUMNS=self.config.columns,
        )  # fmt: skip
        return Launch(kernel, self.pictures * shares * num_blocks, arguments, self.config.num_warps, num_stages)

    def each_group(self, kernel: object, shift: Tensor | None, **arguments: object) -> Launch:
        """A program for each picture and group."""
        shares, size = power_of_two(self.num_shares), power_of_two(self.group)
        arguments = arguments | dict(
            num_pixels=self.num_pixels, num_shares=self.num_shares, HAS_SHIFT=shift is not None, WIDTH=self.width,
            GROUP=self.group, SHARES=shares, SIZE=size,
        )  # fmt: skip
        num_warps = min(4, max(1, shares * size // _NUMBERS_A_WARP))
        return Launch(kernel, self.pictures * (self.width // self.group), arguments, num_warps, 1)


def forward_launches(
    plan: Plan, x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None, eps: float, has_silu: bool, out: Tensor,
    norms: Tensor,
) -> list[Launch]:  # fmt: skip
    """What fills `out` and `norms`, in order."""
    moments = x.new_empty(plan.pictures, plan.num_shares, 2, plan.width, dtype=torch.float32)
    given = {"shift_ptr": x if shift is None else shift, "per_share": plan.per_share, "eps": eps}
    parameters = {"weight_ptr": weight, "bias_ptr": bias, "norms_ptr": norms, "HAS_SILU": has_silu}
    return [
        plan.walking(moments_kernel, x_ptr=x, moments_ptr=moments),
        plan.each_group(group_moments_kernel, shift, moments_ptr=moments, norms_ptr=norms, **given),
        plan.each_block(apply_kernel, x_ptr=x, out_ptr=out, **parameters),
    ]


def backward_launches(
    plan: Plan, x: Tensor, weight: Tensor, bias: Tensor, norms: Tensor, grad: Tensor, has_silu: bool, out: Tensor,
    totals: Tensor, grad_shift: Tensor | None,
) -> list[Launch]:  # fmt: skip
    """What fills `out`, `totals` and `grad_shift`, in order."""
    sums = x.new_empty(plan.pictures, plan.num_shares, 2, plan.width, dtype=torch.float32)
    means = torch.empty_like(totals)
    inputs = {"x_ptr": x, "norms_ptr": norms, "weight_ptr": weight, "bias_ptr": bias, "grad_ptr": grad}
    group = {"norms_ptr": norms, "weight_ptr": weight, "totals_ptr": totals, "means_ptr": means}
    group["grad_shift_ptr"] = x if grad_shift is None else grad_shift
    return [
        plan.walking(grad_sums_kernel, sums_ptr=sums, HAS_SILU=has_silu, **inputs),
        plan.each_group(group_grads_kernel, grad_shift, sums_ptr=sums, **group),
        plan.each_block(grad_kernel, means_ptr=means, out_ptr=out, HAS_SILU=has_silu, **inputs),
    ]
