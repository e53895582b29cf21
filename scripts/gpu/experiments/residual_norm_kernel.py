"""x + out, and the LayerNorm of it, in one kernel: a program holds whole rows, reads each number once and writes both
results.

The sum is rounded to its dtype before it is normalised, as where two operations do it: both results are of the same
numbers.
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

from mmattn.kernels.blocks import load_rows, store_rows
from mmattn.kernels.launch import Launch
from mmattn.kernels.tiles import ceil_div, tiles_of


class Config(NamedTuple):
    """Rows a program, and its warps."""

    rows: int
    num_warps: int


CONFIGS = (Config(1, 1), Config(1, 2), Config(1, 4), Config(2, 4), Config(4, 4))


@triton.jit(do_not_specialize=["num_rows"])
def residual_norm_kernel(
    x_ptr, out_ptr, gamma_ptr, beta_ptr, sum_ptr, normed_ptr, num_rows, eps,
    WIDTH: tl.constexpr, TILES: tl.constexpr, STRIDES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Rows of x [N, C] and out [N, C]: their sum, and its LayerNorm."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    rows = first + tl.arange(0, ROWS)
    is_row = rows < num_rows
    x = load_rows(x_ptr, rows, is_row, STRIDES, WIDTH, TILES, 1)
    out = load_rows(out_ptr, rows, is_row, STRIDES, WIDTH, TILES, 1)
    sums = ()
    total = tl.full([ROWS], 0.0, dtype=tl.float32)
    for d in tl.static_range(len(TILES)):
        rounded = (x[d].to(tl.float32) + out[d].to(tl.float32)).to(sum_ptr.dtype.element_ty)
        sums = sums + (rounded,)
        total += tl.sum(rounded.to(tl.float32), 1)
    store_rows(sum_ptr, sums, rows, is_row, STRIDES, WIDTH, TILES, 1)
    mean = total / WIDTH
    squares = tl.full([ROWS], 0.0, dtype=tl.float32)
    for d in tl.static_range(len(TILES)):
        is_column = TILES[d][0] + tl.arange(0, TILES[d][1]) < WIDTH
        centered = tl.where(is_column[None, :], sums[d].to(tl.float32) - mean[:, None], 0.0)
        squares += tl.sum(centered * centered, 1)
    scale = 1.0 / tl.sqrt(squares / WIDTH + eps)
    normed = ()
    for d in tl.static_range(len(TILES)):
        columns = TILES[d][0] + tl.arange(0, TILES[d][1])
        gamma = tl.load(gamma_ptr + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)
        beta = tl.load(beta_ptr + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)
        value = (sums[d].to(tl.float32) - mean[:, None]) * scale[:, None]
        normed = normed + (value * gamma[None, :] + beta[None, :],)
    store_rows(normed_ptr, normed, rows, is_row, STRIDES, WIDTH, TILES, 1)


def residual_norm_launch(
    x: Tensor, out: Tensor, gamma: Tensor, beta: Tensor, eps: float, total: Tensor, normed: Tensor, config: Config
) -> Launch:
    """What fills `total` and `normed`: all [N, C], contiguous, gamma and beta [C]."""
    num_rows, width = x.shape
    arguments = dict(
        x_ptr=x, out_ptr=out, gamma_ptr=gamma, beta_ptr=beta, sum_ptr=total, normed_ptr=normed,
        num_rows=num_rows, eps=eps,
        WIDTH=width, TILES=tiles_of(width), STRIDES=(0, 0, width, 1), ROWS=config.rows,
    )  # fmt: skip
    return Launch(residual_norm_kernel, ceil_div(num_rows, config.rows), arguments, config.num_warps, 1)


def residual_norm(
    x: Tensor, out: Tensor, gamma: Tensor, beta: Tensor, eps: float = 1e-5, config: Config = CONFIGS[2]
) -> tuple[Tensor, Tensor]:
    """(x + out, its LayerNorm).

    Args:
        x: [N, C], contiguous.
        out: [N, C], contiguous, in x's dtype.
        gamma: [C].
        beta: [C].
        eps: added to the variance.
        config: rows a program, and warps.

    Raises:
        ValueError: x or out is not contiguous, or they are not alike.
    """
    if x.dim() != 2 or x.shape != out.shape or x.dtype != out.dtype:
        raise ValueError(f"x {list(x.shape)} {x.dtype} and out {list(out.shape)} {out.dtype}: give two alike, [N, C]")
    if not x.is_contiguous() or not out.is_contiguous():
        raise ValueError("x and out have to be contiguous: call .contiguous() first")
    total, normed = torch.empty_like(x), torch.empty_like(x)
    residual_norm_launch(x, out, gamma, beta, eps, total, normed, config).run(x.device)
    return total, normed
