"""LayerNorm and the projection after it in one kernel, in two ways; a program has a block of rows and of columns.

- `norm_projection` reads its rows twice: once for mean and variance, and again, normalised on the way into the
  products.
- `folded_norm_projection` reads them once. Gamma and beta are folded into weight and bias; since
  LayerNorm(x) @ W^T = (x @ W^T - mean * sum(W)) / deviation, rows go into the products as they are, mean and variance
  are found beside them, and the result is corrected at the end. Its products are of numbers that have a mean: it loses
  where the mean is a great many times the deviation.

Variances are sums of squared differences to the row's first number, not to 0: a mean costs no digits in them.

Shapes: N rows, C their width, P columns of the projection.
"""

# What Triton compiles is not what it looks like to a type checker.
# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportReturnType=false
from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from mmattn.kernels.blocks import PRECISION
from mmattn.kernels.launch import Launch
from mmattn.kernels.tiles import ceil_div

BLOCK_K = 64


class Config(NamedTuple):
    """Rows and columns a program, warps, and depth of the pipeline over the width."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


CONFIGS = (Config(128, 128, 8, 3), Config(128, 64, 4, 4), Config(64, 128, 4, 4), Config(64, 64, 4, 4))


class Folded(NamedTuple):
    """A projection with LayerNorm's gamma and beta in it: weight [P, C], and float32 [P] the sums of its rows as they
    were rounded, and the bias."""

    weight: Tensor
    sums: Tensor
    bias: Tensor


def fold(gamma: Tensor, beta: Tensor, weight: Tensor, bias: Tensor | None) -> Folded:
    """Once for a model: W * gamma, and W @ beta + bias; exact but for the rounding of the weight to its dtype."""
    folded = (weight.float() * gamma.float()).to(weight.dtype)
    shift = weight.float() @ beta.float()
    return Folded(folded, folded.float().sum(1), shift if bias is None else shift + bias.float())


@triton.jit
def _place(num_rows, COLUMNS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(rows, which exist, columns) of this program. Columns first: programs that run together share their rows."""
    parts: tl.constexpr = (COLUMNS + BLOCK_N - 1) // BLOCK_N
    program = tl.program_id(0)
    rows = (program // parts).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = (program % parts) * BLOCK_N + tl.arange(0, BLOCK_N)
    return rows, rows < num_rows, columns


@triton.jit
def _load_weight(weight_ptr, columns, inner, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_N: tl.constexpr):
    """[BLOCK_N, BLOCK_K] of a weight [P, C]."""
    pointers = weight_ptr + columns[:, None] * WIDTH + inner[None, :]
    if COLUMNS % BLOCK_N == 0:
        weight = tl.load(pointers)
    else:
        weight = tl.load(pointers, mask=(columns < COLUMNS)[:, None], other=0.0)
    return weight


@triton.jit
def _mean_and_scale(total, squares, first, eps, WIDTH: tl.constexpr):
    """(mean, 1 / deviation) from sums over differences to `first`."""
    offset = total / WIDTH
    variance = tl.maximum(squares / WIDTH - offset * offset, 0.0)
    return first + offset, 1.0 / tl.sqrt(variance + eps)


@triton.jit
def _store(out_ptr, products, rows, is_row, columns, COLUMNS: tl.constexpr):
    is_inside = is_row[:, None] & (columns < COLUMNS)[None, :]
    pointers = out_ptr + rows[:, None] * COLUMNS + columns[None, :]
    tl.store(pointers, products.to(out_ptr.dtype.element_ty), mask=is_inside)


@triton.jit(do_not_specialize=["num_rows"])
def norm_projection_kernel(
    x_ptr, gamma_ptr, beta_ptr, weight_ptr, bias_ptr, out_ptr, num_rows, eps,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """LayerNorm of rows [N, C], rounded to their dtype, times weight [P, C]^T."""
    rows, is_row, columns = _place(num_rows, COLUMNS, BLOCK_M, BLOCK_N)
    x_rows = x_ptr + rows[:, None] * WIDTH
    first = tl.load(x_ptr + rows * WIDTH, mask=is_row, other=0.0).to(tl.float32)
    total = tl.full([BLOCK_M], 0.0, dtype=tl.float32)
    squares = tl.full([BLOCK_M], 0.0, dtype=tl.float32)
    for start in tl.range(0, WIDTH, BLOCK_K):
        inner = start + tl.arange(0, BLOCK_K)
        x = tl.load(x_rows + inner[None, :], mask=is_row[:, None], other=0.0).to(tl.float32) - first[:, None]
        total += tl.sum(x, 1)
        squares += tl.sum(x * x, 1)
    mean, scale = _mean_and_scale(total, squares, first, eps, WIDTH)
    products = tl.full([BLOCK_M, BLOCK_N], 0.0, dtype=tl.float32)
    for start in tl.range(0, WIDTH, BLOCK_K):
        inner = start + tl.arange(0, BLOCK_K)
        x = tl.load(x_rows + inner[None, :], mask=is_row[:, None], other=0.0).to(tl.float32)
        gamma, beta = tl.load(gamma_ptr + inner).to(tl.float32), tl.load(beta_ptr + inner).to(tl.float32)
        normed = (x - mean[:, None]) * scale[:, None] * gamma[None, :] + beta[None, :]
        weight = _load_weight(weight_ptr, columns, inner, WIDTH, COLUMNS, BLOCK_N)
        products = tl.dot(normed.to(weight.dtype), weight.T, products, input_precision=PRECISION)
    if HAS_BIAS:
        products += tl.load(bias_ptr + columns, mask=columns < COLUMNS, other=0.0).to(tl.float32)[None, :]
    _store(out_ptr, products, rows, is_row, columns, COLUMNS)


@triton.jit(do_not_specialize=["num_rows"])
def folded_norm_projection_kernel(
    x_ptr, weight_ptr, sums_ptr, bias_ptr, out_ptr, num_rows, eps,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The same of rows [N, C] with gamma and beta in weight and bias: products first, corrected afterwards."""
    rows, is_row, columns = _place(num_rows, COLUMNS, BLOCK_M, BLOCK_N)
    x_rows = x_ptr + rows[:, None] * WIDTH
    first = tl.load(x_ptr + rows * WIDTH, mask=is_row, other=0.0).to(tl.float32)
    total = tl.full([BLOCK_M], 0.0, dtype=tl.float32)
    squares = tl.full([BLOCK_M], 0.0, dtype=tl.float32)
    products = tl.full([BLOCK_M, BLOCK_N], 0.0, dtype=tl.float32)
    for start in tl.range(0, WIDTH, BLOCK_K):
        inner = start + tl.arange(0, BLOCK_K)
        x = tl.load(x_rows + inner[None, :], mask=is_row[:, None], other=0.0)
        weight = _load_weight(weight_ptr, columns, inner, WIDTH, COLUMNS, BLOCK_N)
        products = tl.dot(x, weight.T, products, input_precision=PRECISION)
        difference = x.to(tl.float32) - first[:, None]
        total += tl.sum(difference, 1)
        squares += tl.sum(difference * difference, 1)
    mean, scale = _mean_and_scale(total, squares, first, eps, WIDTH)
    sums = tl.load(sums_ptr + columns, mask=columns < COLUMNS, other=0.0)
    bias = tl.load(bias_ptr + columns, mask=columns < COLUMNS, other=0.0)
    products = (products - mean[:, None] * sums[None, :]) * scale[:, None] + bias[None, :]
    _store(out_ptr, products, rows, is_row, columns, COLUMNS)


def _launch(kernel: Any, tensors: dict[str, Any], x: Tensor, out: Tensor, eps: float, config: Config) -> Launch:
    num_rows, width = x.shape
    sizes = dict(num_rows=num_rows, eps=eps, WIDTH=width, COLUMNS=out.shape[1])
    blocks = dict(BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=BLOCK_K)
    programs = ceil_div(num_rows, config.block_m) * ceil_div(out.shape[1], config.block_n)
    arguments = tensors | dict(x_ptr=x, out_ptr=out) | sizes | blocks
    return Launch(kernel, programs, arguments, config.num_warps, config.num_stages)


def norm_projection_launch(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    out: Tensor,
    config: Config,
) -> Launch:
    """What fills `out` [N, P]; shapes are those of `norm_projection`."""
    tensors = dict(gamma_ptr=gamma, beta_ptr=beta, weight_ptr=weight, bias_ptr=weight if bias is None else bias)
    return _launch(norm_projection_kernel, tensors | {"HAS_BIAS": bias is not None}, x, out, eps, config)


def folded_norm_projection_launch(x: Tensor, folded: Folded, eps: float, out: Tensor, config: Config) -> Launch:
    """What fills `out` [N, P]; shapes are those of `folded_norm_projection`."""
    tensors = dict(weight_ptr=folded.weight, sums_ptr=folded.sums, bias_ptr=folded.bias)
    return _launch(folded_norm_projection_kernel, tensors, x, out, eps, config)


def norm_projection(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float = 1e-5,
    config: Config = CONFIGS[0],
) -> Tensor:
    """LayerNorm(x) @ weight^T + bias: [N, P].

    Args:
        x: [N, C], contiguous, C a multiple of 64.
        gamma: [C].
        beta: [C].
        weight: [P, C], contiguous, in x's dtype.
        bias: [P].
        eps: added to the variance.
        config: block sizes.

    Raises:
        ValueError: x or weight has another shape, dtype or layout.
    """
    out = _empty(x, weight)
    norm_projection_launch(x, gamma, beta, weight, bias, eps, out, config).run(x.device)
    return out


def folded_norm_projection(x: Tensor, folded: Folded, eps: float = 1e-5, config: Config = CONFIGS[0]) -> Tensor:
    """The same with what `fold` made of the parameters: [N, P].

    Args:
        x: [N, C], contiguous, C a multiple of 64.
        folded: weight [P, C] in x's dtype.
        eps: added to the variance.
        config: block sizes.

    Raises:
        ValueError: x or the weight has another shape, dtype or layout.
    """
    out = _empty(x, folded.weight)
    folded_norm_projection_launch(x, folded, eps, out, config).run(x.device)
    return out


def _empty(x: Tensor, weight: Tensor) -> Tensor:
    """[N, P], of arguments that the kernels take."""
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1] or x.dtype != weight.dtype:
        said = f"x {list(x.shape)} {x.dtype}, weight {list(weight.shape)} {weight.dtype}"
        raise ValueError(f"{said}: give [N, C] and [P, C] in one dtype")
    if x.shape[1] % BLOCK_K:
        raise ValueError(f"rows of {x.shape[1]} numbers: the kernels take multiples of {BLOCK_K}")
    if not x.is_contiguous() or not weight.is_contiguous():
        raise ValueError("x and weight have to be contiguous: call .contiguous() first")
    return x.new_empty(x.shape[0], weight.shape[0])
