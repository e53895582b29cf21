"""Parts of the kernels for packed rows: who may attend to whom, what keeps neighbours apart, block sizes.

A block of neighbouring rows belongs to whatever sequences lie there. For each of its rows there is a range of rows of
the other side: a query's keys, or a key's queries. Causality is part of it: a score costs two comparisons either way.

Shapes: M rows of a block, N rows of a block of the other side, D a block of the head.
"""

# What Triton compiles is not what it looks like to a type checker.
# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportReturnType=false
from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from mmattn.kernels.launch import SIZES, Card

# Arguments that change from batch to batch: one compiled kernel serves all their values.
PACKED_SIZES = (*SIZES, "num_sequences")
_NARROW, _MEDIUM, _WIDE = 64, 80, 96
_NOWHERE = tl.constexpr(2**31 - 1)


@dataclass(frozen=True)
class RowsConfig:
    """Attributes: rows a program, rows of the other side a block, warps, pipeline depth."""

    block_m: int = 64
    block_n: int = 32
    num_warps: int = 4
    num_stages: int = 2


@triton.jit
def partners(
    rows, is_row, numbers_ptr, own_starts_ptr, other_starts_ptr, num_sequences,
    IS_CAUSAL: tl.constexpr, ARE_KEYS: tl.constexpr,
):  # fmt: skip
    """(first, end): the range of the other side's rows for each of `rows` [M], empty for rows of no sequence.

    Causal, a query sees the key that stands as far from its sequence's last key as the query from the last query, and
    those before it.
    """
    numbers = tl.load(numbers_ptr + rows, mask=is_row, other=num_sequences)
    is_row = is_row & (numbers < num_sequences)
    first = tl.load(other_starts_ptr + numbers, mask=is_row, other=_NOWHERE)
    end = tl.load(other_starts_ptr + numbers + 1, mask=is_row, other=0)
    if IS_CAUSAL:
        level = rows + (end - tl.load(own_starts_ptr + numbers + 1, mask=is_row, other=0))
        if ARE_KEYS:
            first = tl.maximum(first, level)
        else:
            end = tl.where(is_row, level + 1, 0)
    return first, end


@triton.jit
def place_of_rows(
    num_heads, num_rows, numbers_ptr, own_starts_ptr, other_starts_ptr, num_sequences,
    BLOCK_M: tl.constexpr, IS_CAUSAL: tl.constexpr, ARE_KEYS: tl.constexpr,
):  # fmt: skip
    """(head, first row, rows [M] counted from it, which of them there are, first, end: `partners`) of this program.
    Heads first, so that whole rows are read by programs side by side."""
    head = (tl.program_id(0) % num_heads).to(tl.int64)
    start = tl.program_id(0) // num_heads * BLOCK_M
    far = start.to(tl.int64)
    rows = tl.arange(0, BLOCK_M)
    is_row = rows < num_rows - start
    first, end = partners(
        start + rows, is_row, numbers_ptr, own_starts_ptr, other_starts_ptr, num_sequences, IS_CAUSAL, ARE_KEYS
    )  # fmt: skip
    return head, far, rows, is_row, first, end


@triton.jit
def span(first, end):
    """(earliest, last): from where to where the ranges of all rows [M] reach; of none, last comes before earliest."""
    return tl.min(first, axis=0), tl.maximum(tl.max(end, axis=0), 0)


@triton.jit
def are_partners(others, first, end):
    """Which rows [M] of a block have to do with which `others` [N]: [M, N]."""
    return (others[None, :] >= first[:, None]) & (others[None, :] < end[:, None])


@triton.jit
def sifted(blocks, ROWS: tl.constexpr, DIM_TILES: tl.constexpr):
    """(blocks [N, D] with zeros for NaN and infinities, 0 for rows [N] without and NaN for rows with any)."""
    kept = ()
    spoilt = tl.full([ROWS], 0.0, dtype=tl.float32)
    for d in tl.static_range(len(DIM_TILES)):
        # Of what is not finite 0 times it is NaN.
        zeros = blocks[d].to(tl.float32) * 0.0
        kept = kept + (tl.where(zeros == 0.0, blocks[d], 0.0).to(blocks[d].dtype),)
        spoilt += tl.sum(zeros, axis=1)
    return kept, spoilt


@triton.jit
def has_nan(blocks, DIM_TILES: tl.constexpr):
    """Is there a NaN in blocks [M, D]?"""
    found = tl.max(tl.max((blocks[0] != blocks[0]).to(tl.int32), axis=1), axis=0)
    for d in tl.static_range(1, len(DIM_TILES)):
        found = tl.maximum(found, tl.max(tl.max((blocks[d] != blocks[d]).to(tl.int32), axis=1), axis=0))
    return found > 0


def rows_config(card: Card, dtype: torch.dtype, head_dim: int, are_keys: bool) -> RowsConfig:
    """The configuration of a kernel that has queries, or keys and the sums of both their gradients.

    Small blocks of the other side: sequences are short, and what a block has of others is computed for nothing. The
    largest that spill nothing, or next to nothing, on compute capability 9.0 and 8.0.
    """
    if dtype.itemsize > 2:
        return RowsConfig(block_m=32, num_stages=1)
    if not card.has_warp_groups:
        return _rows_config_of_warps(head_dim, are_keys)
    if are_keys and head_dim > _WIDE:
        return RowsConfig(block_m=32, num_warps=8) if head_dim <= 128 else RowsConfig(block_n=16, num_warps=8)
    if head_dim <= _NARROW:
        return RowsConfig(num_stages=3)
    return RowsConfig(num_warps=8 if head_dim > (_MEDIUM if are_keys else _WIDE) else 4)


def _rows_config_of_warps(head_dim: int, are_keys: bool) -> RowsConfig:
    """Where a matrix instruction is a warp's, its operands take registers too."""
    if are_keys and head_dim > 128:
        return RowsConfig(block_m=16, block_n=16)
    if are_keys and head_dim > _WIDE:
        return RowsConfig(block_m=32, num_warps=8)
    if head_dim > 128 or (are_keys and head_dim > 64):
        return RowsConfig(block_n=16, num_warps=8)
    return RowsConfig(num_warps=8 if head_dim > _WIDE else 4)
