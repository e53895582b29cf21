"""The product of a gated feed-forward block, value * act(gate), forward and backward.

    out = value * act(gate)     dvalue = dout * act(gate)     dgate = dout * value * act'(gate)

Every number is read once and written once, and computed with in float32. A program has some rows and columns of one
half, and the same of the other; a thread moves 16 bytes at a time. Memory is to take the time, so instructions count:
with the library's erf they would take as long (57 a number backward, compiled for 9.0, where these take 43).

Sizes: R rows of value and gate side by side [R, 2 F].
"""

# What Triton compiles is not what it looks like to a type checker.
# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportReturnType=false
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mmattn.kernels.launch import ACCESS_BYTES, Launch, access_unit
from mmattn.kernels.tiles import ceil_div

_NUM_WARPS = 4
_WARP_SIZE = 32
_TO_FALLOFF = tl.constexpr(-0.7213475204444817)  # exp(-x * x / 2) as a power of 2
_NORMAL_AT_ZERO = tl.constexpr(0.3989422804014327)  # the normal density, 1 / sqrt(2 pi)
# It changes from call to call: one compiled kernel serves all its values.
_VARYING = ("num_rows",)


@triton.jit
def _normal_below(x, falloff):
    """The normal distribution's share below x, (1 + erf(x / sqrt 2)) / 2, given falloff = exp(-x * x / 2).

    The share beyond |x| over the falloff, t times a polynomial of t: fitted by least squares, weighted anew until the
    largest errors (3e-8 of the share near 0) were equal. Rounding included the result is within 1.1 * 2^-23, as with an
    exact erf in float32, and tails are more exact than those of 1 + erf, which cancel.
    """
    t = 1.0 / (1.0 + 0.44 * tl.abs(x))
    ratio = 0.025067716312884365
    ratio = ratio * t - 0.16245400599838414
    ratio = ratio * t + 0.41889271468063366
    ratio = ratio * t - 0.5049570784145714
    ratio = ratio * t + 0.2134290400440495
    ratio = ratio * t + 0.006524061273725717
    ratio = ratio * t + 0.15354543331055628
    ratio = ratio * t + 0.17437062641809453
    ratio = ratio * t + 0.17558147824931236
    beyond = ratio * t * falloff
    return tl.where(x < 0, beyond, 1.0 - beyond)


@triton.jit
def _activated(gate, ACTIVATION: tl.constexpr):
    """(act(gate), act'(gate))."""
    if ACTIVATION == "gelu":
        falloff = tl.exp2(gate * gate * _TO_FALLOFF)
        below = _normal_below(gate, falloff)
        slope = below + gate * (falloff * _NORMAL_AT_ZERO)
    else:
        tl.static_assert(ACTIVATION == "silu")
        below = tl.sigmoid(gate)
        slope = below * (1.0 + gate * (1.0 - below))
    return gate * below, slope


@triton.jit
def _place(num_rows, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(rows [M, 1], columns [1, N], which of them there are [M, N]) of this program. Columns first: programs that run
    together read whole rows."""
    num_blocks: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    program = tl.program_id(0)
    rows = (program // num_blocks) * ROWS + tl.arange(0, ROWS)[:, None]
    columns = (program % num_blocks) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    return rows.to(tl.int64), columns, (rows < num_rows) & (columns < WIDTH)


@triton.jit(do_not_specialize=_VARYING)
def gated_fwd_kernel(
    joined_ptr, output_ptr, joined_stride, num_rows,
    ACTIVATION: tl.constexpr, WIDTH: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """output [R, F], contiguous."""
    rows, columns, is_inside = _place(num_rows, WIDTH, ROWS, COLUMNS)
    joined = joined_ptr + rows * joined_stride * UNIT + columns
    value = tl.load(joined, mask=is_inside, other=0.0).to(tl.float32)
    gate = tl.load(joined + WIDTH, mask=is_inside, other=0.0).to(tl.float32)
    activated, _ = _activated(gate, ACTIVATION)
    output = (value * activated).to(output_ptr.dtype.element_ty)
    tl.store(output_ptr + rows * WIDTH + columns, output, mask=is_inside)


@triton.jit(do_not_specialize=_VARYING)
def gated_bwd_kernel(
    grad_output_ptr, joined_ptr, grad_joined_ptr, grad_output_stride, joined_stride, num_rows,
    ACTIVATION: tl.constexpr, WIDTH: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """grad_joined [R, 2 F], contiguous."""
    rows, columns, is_inside = _place(num_rows, WIDTH, ROWS, COLUMNS)
    joined = joined_ptr + rows * joined_stride * UNIT + columns
    grad_output = grad_output_ptr + rows * grad_output_stride * UNIT + columns
    value = tl.load(joined, mask=is_inside, other=0.0).to(tl.float32)
    gate = tl.load(joined + WIDTH, mask=is_inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_output, mask=is_inside, other=0.0).to(tl.float32)
    activated, slope = _activated(gate, ACTIVATION)
    grad_joined = grad_joined_ptr + rows * (2 * WIDTH) + columns
    dtype: tl.constexpr = grad_joined_ptr.dtype.element_ty
    tl.store(grad_joined, (grad * activated).to(dtype), mask=is_inside)
    tl.store(grad_joined + WIDTH, (grad * value * slope).to(dtype), mask=is_inside)


def forward_launch(joined: Tensor, output: Tensor, activation: str) -> Launch:
    """The launch that fills `output`.

    Args:
        joined: [R, 2 F], float32, bfloat16 or float16, its last axis contiguous; not empty.
        output: [R, F], contiguous, to be written.
        activation: of the second half, "gelu" or "silu".
    """
    arguments = dict(joined_ptr=joined, output_ptr=output)
    return _launch(gated_fwd_kernel, arguments, output, activation, joined=joined)


def backward_launch(grad_output: Tensor, joined: Tensor, grad_joined: Tensor, activation: str) -> Launch:
    """The launch that fills `grad_joined`.

    Args:
        grad_output: [R, F], its last axis contiguous.
        joined: the forward's.
        grad_joined: [R, 2 F], contiguous, to be written.
        activation: the forward's.
    """
    arguments = dict(grad_output_ptr=grad_output, joined_ptr=joined, grad_joined_ptr=grad_joined)
    return _launch(gated_bwd_kernel, arguments, grad_output, activation, grad_output=grad_output, joined=joined)


def _launch(kernel: object, pointers: dict[str, Tensor], half: Tensor, activation: str, **strided: Tensor) -> Launch:
    num_rows, width = half.shape
    unit = access_unit(*strided.values())
    unit = unit if width % unit == 0 else 1
    rows, columns = _block(width, half.element_size())
    arguments = dict(
        **pointers,
        # In units: multiplying in the kernel tells the compiler that rows begin at multiples of 16 bytes.
        **{f"{name}_stride": tensor.stride(0) // unit for name, tensor in strided.items()},
        num_rows=num_rows,
        ACTIVATION=activation,
        WIDTH=width,
        UNIT=unit,
        ROWS=rows,
        COLUMNS=columns,
    )
    programs = ceil_div(num_rows, rows) * ceil_div(width, columns)
    return Launch(kernel, programs, arguments, _NUM_WARPS, 1)


def _block(width: int, element_size: int) -> tuple[int, int]:
    """(rows, columns) of a program: a warp's columns, or as many fewer, down to a cache line's, as leave less empty.
    One access of a thread to each tensor: a full processor's threads, of 32 registers, keep memory busy with that."""
    most = _WARP_SIZE * ACCESS_BYTES // element_size
    columns = min((most, most // 2, most // 4), key=lambda size: ceil_div(width, size) * size)
    return _NUM_WARPS * most // columns, columns
