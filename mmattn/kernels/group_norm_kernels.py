"""GroupNorm (arXiv 1803.08494) of pictures in channels-last, with what a U-Net's ResNets have about it: a number for
each picture and channel added before (the time embedding), SiLU after. `group_norm_launches` launches these kernels.

The pictures are read once for their moments and once to be normalised; backward, read with the gradient for the sums
over pixels, and once more for their own gradient. Everything in between, which stock keeps in float32 under autocast,
is in registers. No atomics: the same inputs give the same bits.

A walk over pixels is bound by memory only if nothing waits within it: its loads are in flight blocks ahead, and each
place of the block has sums of its own, which are added up once, at the end.

Shapes: B pictures, P pixels, C channels, G groups, S shares of a picture's pixels; [M, N] pixels and channels of a
block.
"""

# What Triton compiles is not what it looks like to a type checker.
# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportReturnType=false
from __future__ import annotations

import triton
import triton.language as tl

from mmattn.kernels.blocks import LOG2_E

# One compiled kernel serves all their values.
_VARYING = ("num_pixels", "per_share", "num_shares", "num_blocks", "num_rows")


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
def pixel(base, picture, start, num_pixels, WIDTH: tl.constexpr):
    """Where pixel `start` of a picture begins in [B, P, C]."""
    return base + (picture * num_pixels + start) * WIDTH


@triton.jit
def of_channels(base, columns, WIDTH: tl.constexpr):
    """A number for each channel [N], in float32."""
    return tl.load(base + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)


@triton.jit
def pixels(
    base, count, columns, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, IS_WHOLE: tl.constexpr
):  # fmt: skip
    """Numbers [M, N] from `base` on in float32, zeros behind `count` pixels, of which a whole block has enough."""
    rows = tl.arange(0, ROWS)
    pointers = base + rows[:, None] * WIDTH + columns[None, :]
    if IS_WHOLE and WIDTH % COLUMNS == 0:
        block = tl.load(pointers)
    else:
        block = tl.load(pointers, mask=(rows < count)[:, None] & (columns < WIDTH)[None, :], other=0.0)
    return block.to(tl.float32)


@triton.jit
def put_pixels(base, block, count, columns, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """Write what `pixels` would read."""
    rows = tl.arange(0, ROWS)
    pointers = base + rows[:, None] * WIDTH + columns[None, :]
    is_there = (rows < count)[:, None] & (columns < WIDTH)[None, :]
    tl.store(pointers, block.to(base.dtype.element_ty), mask=is_there)


@triton.jit
def put_pair(pairs_ptr, number, first, second, columns, WIDTH: tl.constexpr):
    """Write two numbers for each channel as the `number`-th pair of rows [2, C]."""
    base = pairs_ptr + number * 2 * WIDTH + columns
    tl.store(base, first, mask=columns < WIDTH)
    tl.store(base + WIDTH, second, mask=columns < WIDTH)


@triton.jit
def distances(
    base, count, pivot, columns, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, IS_WHOLE: tl.constexpr
):  # fmt: skip
    """Of pixels [M, N] from the pivot of each channel."""
    found = pixels(base, count, columns, WIDTH, ROWS, COLUMNS, IS_WHOLE) - pivot[None, :]
    if not IS_WHOLE:
        found = tl.where((tl.arange(0, ROWS) < count)[:, None], found, 0.0)
    return found


@triton.jit(do_not_specialize=_VARYING)
def norm_moments_kernel(
    x_ptr, moments_ptr, num_pixels, per_share, num_shares, num_blocks,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """moments [B, S, 2, C] of x [B, P, C]: the mean of a share's pixels, and their squared distances from it, summed.
    Taken from distances to the mean of the share's first block: no difference of squares that a mean has made large."""
    columns, share, picture = place(num_blocks, num_shares, COLUMNS)
    begin = share * per_share
    count = tl.minimum(per_share, num_pixels - begin)
    base = pixel(x_ptr, picture, begin, num_pixels, WIDTH)
    first = pixels(base, count, columns, WIDTH, ROWS, COLUMNS, False)
    pivot = tl.sum(first, 0) / tl.minimum(count, ROWS).to(tl.float32)
    sums = tl.full([ROWS, COLUMNS], 0.0, dtype=tl.float32)
    squares = tl.full([ROWS, COLUMNS], 0.0, dtype=tl.float32)
    whole = count // ROWS
    for _ in tl.range(0, whole, num_stages=STAGES):
        found = distances(base, ROWS, pivot, columns, WIDTH, ROWS, COLUMNS, True)
        sums += found
        squares += found * found
        base += ROWS * WIDTH
    rest = count - whole * ROWS
    if rest > 0:
        found = distances(base, rest, pivot, columns, WIDTH, ROWS, COLUMNS, False)
        sums += found
        squares += found * found
    mean = tl.sum(sums, 0) / count.to(tl.float32)
    around = tl.maximum(tl.sum(squares, 0) - mean * mean * count.to(tl.float32), 0.0)
    put_pair(moments_ptr, picture * num_shares + share, pivot + mean, around, columns, WIDTH)


@triton.jit
def channels_of_group(WIDTH: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr):
    """(picture, channels, which of them there are) of this program's group."""
    inside = tl.arange(0, SIZE)
    columns = tl.program_id(0) % (WIDTH // GROUP) * GROUP + inside
    return (tl.program_id(0) // (WIDTH // GROUP)).to(tl.int64), columns, inside < GROUP


@triton.jit
def shares_of_group(pairs_ptr, which, picture, shares, num_shares, columns, is_channel, WIDTH: tl.constexpr):
    """One of each pair [some shares, channels of a group]."""
    pointers = pairs_ptr + ((picture * num_shares + shares) * 2 + which)[:, None] * WIDTH + columns[None, :]
    return tl.load(pointers, mask=(shares < num_shares)[:, None] & is_channel[None, :], other=0.0)


@triton.jit
def pixels_of_shares(shares, per_share, num_pixels):
    """How many each of them has, in float32; none behind the last."""
    return tl.maximum(tl.minimum(num_pixels - shares * per_share, per_share), 0).to(tl.float32)


@triton.jit(do_not_specialize=_VARYING)
def norm_groups_kernel(
    moments_ptr, shift_ptr, norms_ptr, num_pixels, per_share, num_shares, eps,
    HAS_SHIFT: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr, SHARES: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """norms [B, 3, C]: what to take from x, what to multiply with, and the sum over pixels of what comes out."""
    picture, columns, is_channel = channels_of_group(WIDTH, GROUP, SIZE)
    shift = tl.full([SIZE], 0.0, dtype=tl.float32)
    if HAS_SHIFT:
        shift = tl.load(shift_ptr + picture * WIDTH + columns, mask=is_channel, other=0.0).to(tl.float32)
    totals = tl.full([SHARES, SIZE], 0.0, dtype=tl.float32)
    for start in tl.range(0, num_shares, SHARES):
        shares = start + tl.arange(0, SHARES)
        means = shares_of_group(moments_ptr, 0, picture, shares, num_shares, columns, is_channel, WIDTH)
        totals += means * pixels_of_shares(shares, per_share, num_pixels)[:, None]
    pixels_in_all = num_pixels.to(tl.float32)
    channel_mean = tl.sum(totals, 0) / pixels_in_all + shift
    mean = tl.sum(channel_mean, 0) / GROUP
    around = tl.full([SHARES, SIZE], 0.0, dtype=tl.float32)
    for start in tl.range(0, num_shares, SHARES):
        shares = start + tl.arange(0, SHARES)
        means = shares_of_group(moments_ptr, 0, picture, shares, num_shares, columns, is_channel, WIDTH)
        squares = shares_of_group(moments_ptr, 1, picture, shares, num_shares, columns, is_channel, WIDTH)
        distance = tl.where(is_channel[None, :], means + shift[None, :] - mean, 0.0)
        around += squares + distance * distance * pixels_of_shares(shares, per_share, num_pixels)[:, None]
    variance = tl.sum(tl.sum(around, 1), 0) / (pixels_in_all * GROUP)
    scale = 1.0 / tl.sqrt(variance + eps)
    base = norms_ptr + picture * 3 * WIDTH + columns
    tl.store(base, mean - shift, mask=is_channel)
    tl.store(base + WIDTH, tl.full([SIZE], 0.0, dtype=tl.float32) + scale, mask=is_channel)
    tl.store(base + 2 * WIDTH, (channel_mean - mean) * scale * pixels_in_all, mask=is_channel)


@triton.jit
def sigmoid(x, IS_SINGLE: tl.constexpr):
    """Of x [M, N]; IS_SINGLE: for float32. Backward would wait for instructions longer than for memory: a division and
    an exponential take six more than an inverse square root, whose square is as good in half types, and a power of 2.
    """
    total = 1.0 + tl.exp2(x * -LOG2_E)
    if IS_SINGLE:
        return 1.0 / total
    root = tl.rsqrt(total)
    return root * root


@triton.jit
def factors(norms_ptr, weight_ptr, bias_ptr, picture, columns, WIDTH: tl.constexpr):
    """Of each channel [N]: what to take from x, what to multiply it with then (the weight in it), and the bias."""
    base = norms_ptr + picture * 3 * WIDTH
    factor = of_channels(base + WIDTH, columns, WIDTH) * of_channels(weight_ptr, columns, WIDTH)
    return of_channels(base, columns, WIDTH), factor, of_channels(bias_ptr, columns, WIDTH)


@triton.jit(do_not_specialize=_VARYING)
def norm_apply_kernel(
    x_ptr, norms_ptr, weight_ptr, bias_ptr, out_ptr, num_pixels, num_shares, num_blocks,
    HAS_SILU: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out [B, P, C]: a share is a block of pixels here."""
    columns, share, picture = place(num_blocks, num_shares, COLUMNS)
    count = num_pixels - share * ROWS
    x = pixels(pixel(x_ptr, picture, share * ROWS, num_pixels, WIDTH), count, columns, WIDTH, ROWS, COLUMNS, False)
    centre, factor, bias = factors(norms_ptr, weight_ptr, bias_ptr, picture, columns, WIDTH)
    out = (x - centre[None, :]) * factor[None, :] + bias[None, :]
    if HAS_SILU:
        out = out * sigmoid(out, x_ptr.dtype.element_ty == tl.float32)
    put_pixels(pixel(out_ptr, picture, share * ROWS, num_pixels, WIDTH), out, count, columns, WIDTH, ROWS)


@triton.jit
def centred_and_grad(
    x_base, grad_base, count, centre, factor, bias, columns, HAS_SILU: tl.constexpr,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, IS_WHOLE: tl.constexpr,
):  # fmt: skip
    """(x without the mean, gradient before SiLU), both [M, N]; the gradient is zero where there are no pixels."""
    x = pixels(x_base, count, columns, WIDTH, ROWS, COLUMNS, IS_WHOLE) - centre[None, :]
    grad = pixels(grad_base, count, columns, WIDTH, ROWS, COLUMNS, IS_WHOLE)
    if HAS_SILU:
        out = x * factor[None, :] + bias[None, :]
        opened = sigmoid(out, x_base.dtype.element_ty == tl.float32)
        grad = grad * (opened * (1.0 + out * (1.0 - opened)))
    return x, grad


@triton.jit(do_not_specialize=_VARYING)
def norm_grad_sums_kernel(
    x_ptr, norms_ptr, weight_ptr, bias_ptr, grad_ptr, sums_ptr, num_pixels, per_share, num_shares, num_blocks,
    HAS_SILU: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """sums [B, S, 2, C] over a share's pixels: of the gradient before SiLU, and of it times x normed."""
    columns, share, picture = place(num_blocks, num_shares, COLUMNS)
    begin = share * per_share
    count = tl.minimum(per_share, num_pixels - begin)
    x_base = pixel(x_ptr, picture, begin, num_pixels, WIDTH)
    grad_base = pixel(grad_ptr, picture, begin, num_pixels, WIDTH)
    centre, factor, bias = factors(norms_ptr, weight_ptr, bias_ptr, picture, columns, WIDTH)
    plain = tl.full([ROWS, COLUMNS], 0.0, dtype=tl.float32)
    weighted = tl.full([ROWS, COLUMNS], 0.0, dtype=tl.float32)
    whole = count // ROWS
    for _ in tl.range(0, whole, num_stages=STAGES):
        x, grad = centred_and_grad(
            x_base, grad_base, ROWS, centre, factor, bias, columns, HAS_SILU, WIDTH, ROWS, COLUMNS, True
        )  # fmt: skip
        plain += grad
        weighted += grad * x
        x_base += ROWS * WIDTH
        grad_base += ROWS * WIDTH
    rest = count - whole * ROWS
    if rest > 0:
        x, grad = centred_and_grad(
            x_base, grad_base, rest, centre, factor, bias, columns, HAS_SILU, WIDTH, ROWS, COLUMNS, False
        )  # fmt: skip
        plain += grad
        weighted += grad * x
    scale = of_channels(norms_ptr + picture * 3 * WIDTH + WIDTH, columns, WIDTH)
    number = picture * num_shares + share
    put_pair(sums_ptr, number, tl.sum(plain, 0), tl.sum(weighted, 0) * scale, columns, WIDTH)


@triton.jit(do_not_specialize=_VARYING)
def norm_group_grads_kernel(
    sums_ptr, norms_ptr, weight_ptr, through_ptr, grad_shift_ptr, num_pixels, num_shares,
    HAS_SHIFT: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr, SHARES: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """through [B, 2, C]: what flows back through the mean, and through the deviation for each unit of x without the
    mean; grad_shift [B, C]."""
    picture, columns, is_channel = channels_of_group(WIDTH, GROUP, SIZE)
    plain = tl.full([SHARES, SIZE], 0.0, dtype=tl.float32)
    weighted = tl.full([SHARES, SIZE], 0.0, dtype=tl.float32)
    for start in tl.range(0, num_shares, SHARES):
        shares = start + tl.arange(0, SHARES)
        plain += shares_of_group(sums_ptr, 0, picture, shares, num_shares, columns, is_channel, WIDTH)
        weighted += shares_of_group(sums_ptr, 1, picture, shares, num_shares, columns, is_channel, WIDTH)
    norms = norms_ptr + picture * 3 * WIDTH + columns
    scale = tl.load(norms + WIDTH, mask=is_channel, other=0.0)
    weight = tl.load(weight_ptr + columns, mask=is_channel, other=0.0).to(tl.float32)
    pixels_in_all = num_pixels.to(tl.float32)
    of_channel = weight * tl.sum(plain, 0)
    by_mean = tl.sum(of_channel, 0) / (pixels_in_all * GROUP)
    by_scale = tl.sum(weight * tl.sum(weighted, 0), 0) / (pixels_in_all * GROUP)
    pair = picture * 2 * WIDTH + columns
    tl.store(through_ptr + pair, scale * by_mean, mask=is_channel)
    tl.store(through_ptr + pair + WIDTH, scale * scale * by_scale, mask=is_channel)
    if HAS_SHIFT:
        total = tl.load(norms + 2 * WIDTH, mask=is_channel, other=0.0)
        grad = scale * (of_channel - pixels_in_all * by_mean - by_scale * total)
        pointers = grad_shift_ptr + picture * WIDTH + columns
        tl.store(pointers, grad.to(grad_shift_ptr.dtype.element_ty), mask=is_channel)


@triton.jit(do_not_specialize=_VARYING)
def norm_grad_kernel(
    x_ptr, norms_ptr, weight_ptr, bias_ptr, grad_ptr, through_ptr, grad_x_ptr, num_pixels, num_shares, num_blocks,
    HAS_SILU: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The gradient [B, P, C] of x: a share is a block of pixels here."""
    columns, share, picture = place(num_blocks, num_shares, COLUMNS)
    start = share * ROWS
    count = num_pixels - start
    centre, factor, bias = factors(norms_ptr, weight_ptr, bias_ptr, picture, columns, WIDTH)
    x_base = pixel(x_ptr, picture, start, num_pixels, WIDTH)
    grad_base = pixel(grad_ptr, picture, start, num_pixels, WIDTH)
    x, grad = centred_and_grad(
        x_base, grad_base, count, centre, factor, bias, columns, HAS_SILU, WIDTH, ROWS, COLUMNS, False
    )  # fmt: skip
    through = through_ptr + picture * 2 * WIDTH
    by_mean, by_scale = of_channels(through, columns, WIDTH), of_channels(through + WIDTH, columns, WIDTH)
    out = grad * factor[None, :] - (x * by_scale[None, :] + by_mean[None, :])
    put_pixels(pixel(grad_x_ptr, picture, start, num_pixels, WIDTH), out, count, columns, WIDTH, ROWS)


@triton.jit(do_not_specialize=_VARYING)
def norm_parameters_kernel(
    sums_ptr, grad_weight_ptr, grad_bias_ptr, num_rows,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Gradients [C] of weight and bias: sums [B S, 2, C] of all shares of all pictures."""
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    plain = tl.full([ROWS, COLUMNS], 0.0, dtype=tl.float32)
    weighted = tl.full([ROWS, COLUMNS], 0.0, dtype=tl.float32)
    for start in tl.range(0, num_rows, ROWS, num_stages=STAGES):
        rows = start + tl.arange(0, ROWS)
        pointers = sums_ptr + rows.to(tl.int64)[:, None] * (2 * WIDTH) + columns[None, :]
        is_there = (rows < num_rows)[:, None] & (columns < WIDTH)[None, :]
        plain += tl.load(pointers, mask=is_there, other=0.0)
        weighted += tl.load(pointers + WIDTH, mask=is_there, other=0.0)
    is_channel = columns < WIDTH
    tl.store(grad_weight_ptr + columns, tl.sum(weighted, 0).to(grad_weight_ptr.dtype.element_ty), mask=is_channel)
    tl.store(grad_bias_ptr + columns, tl.sum(plain, 0).to(grad_bias_ptr.dtype.element_ty), mask=is_channel)
