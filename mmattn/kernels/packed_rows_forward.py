"""Attention of packed sequences, forward: softmax(scale * query @ key^T) @ value within each sequence, and the
log-sum-exp of each row.

Kernels for variable lengths give each sequence programs of its own, with tiles of 128: with sequences of some ten rows
nearly all of a tile is empty, and time goes with the number of sequences. Here a program has a head and a block of
neighbouring rows, whatever sequences they belong to, and walks over the keys from the first of its first sequence to
the last of its last one (`online_softmax`); what is of other sequences is masked.

A weight of 0 times a NaN is NaN: sequences would spoil their neighbours. A program that comes to a NaN does its walk
again, carefully: what is not finite goes into the scores, where masks hold it back, instead of into the products.

Shapes: N rows of all queries, M of all keys, H query heads, G key/value heads, D head_dim, S sequences.
"""

# What Triton compiles is not what it looks like to a type checker.
# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportReturnType=false
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mmattn.kernels.blocks import (
    LOG2_E,
    add_products,
    finish_rows,
    load_rows_of,
    online_softmax,
    row_products,
    rows_of,
    scaled_rows,
    zero_blocks,
)
from mmattn.kernels.launch import Launch, access_unit, card_of, tensor_arguments
from mmattn.kernels.packed_rows_blocks import (
    PACKED_SIZES,
    RowsConfig,
    are_partners,
    has_nan,
    place_of_rows,
    rows_config,
    sifted,
    span,
)
from mmattn.kernels.short_keys_configs import head_tiles
from mmattn.kernels.tiles import ceil_div, power_of_two

# Programs are so many, up to a sixteenth: launches are remembered by it, and batches differ by some rows.
_STEPS = 16


@triton.jit
def _walk(
    query, first, end, key_ptr, value_ptr, key_strides, value_strides, kv_head, scale,
    HEAD_DIM: tl.constexpr, DIM_TILES: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, NUM_STAGES: tl.constexpr, IS_CAREFUL: tl.constexpr,
):  # fmt: skip
    """(weighted sum of values, sum of weights, largest score) of each query [M] over its keys."""
    row_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    total = tl.full([BLOCK_M], 0.0, dtype=tl.float32)
    output = zero_blocks(BLOCK_M, DIM_TILES)
    keys = tl.arange(0, BLOCK_N)
    earliest, last = span(first, end)
    for block in tl.range(tl.cdiv(last - earliest, BLOCK_N), num_stages=NUM_STAGES):
        start = earliest + block * BLOCK_N
        is_key = keys < last - start
        far = start.to(tl.int64)
        key = load_rows_of(key_ptr, key_strides, 0, kv_head, far, keys, is_key, HEAD_DIM, DIM_TILES, UNIT)
        value = load_rows_of(value_ptr, value_strides, 0, kv_head, far, keys, is_key, HEAD_DIM, DIM_TILES, UNIT)
        scores = row_products(query, key, DIM_TILES) * scale
        if IS_CAREFUL:
            value, spoilt = sifted(value, BLOCK_N, DIM_TILES)
            scores += spoilt[None, :]
        scores = tl.where(are_partners(start + keys, first, end), scores, float("-inf"))
        weights, factors, total, row_max = online_softmax(scores, total, row_max)
        output = add_products(scaled_rows(output, factors, DIM_TILES), weights, value, DIM_TILES)
    return output, total, row_max


@triton.jit(do_not_specialize=PACKED_SIZES)
def packed_fwd_kernel(
    query_ptr, key_ptr, value_ptr, output_ptr, lse_ptr, query_starts_ptr, key_starts_ptr, query_numbers_ptr,
    query_strides, key_strides, value_strides, output_strides,
    scale, num_heads, group, num_queries, num_sequences,
    HEAD_DIM: tl.constexpr, DIM_TILES: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, NUM_STAGES: tl.constexpr, IS_CAUSAL: tl.constexpr,
):  # fmt: skip
    """A program has one head and BLOCK_M queries."""
    head, start, rows, is_row, first, end = place_of_rows(
        num_heads, num_queries, query_numbers_ptr, query_starts_ptr, key_starts_ptr, num_sequences,
        BLOCK_M, IS_CAUSAL, False,
    )  # fmt: skip
    query = load_rows_of(query_ptr, query_strides, 0, head, start, rows, is_row, HEAD_DIM, DIM_TILES, UNIT)
    output, total, row_max = _walk(
        query, first, end, key_ptr, value_ptr, key_strides, value_strides, head // group, scale,
        HEAD_DIM, DIM_TILES, UNIT, BLOCK_M, BLOCK_N, NUM_STAGES, False,
    )  # fmt: skip
    if has_nan(output, DIM_TILES):
        output, total, row_max = _walk(
            query, first, end, key_ptr, value_ptr, key_strides, value_strides, head // group, scale,
            HEAD_DIM, DIM_TILES, UNIT, BLOCK_M, BLOCK_N, 1, True,
        )  # fmt: skip
    output_rows = rows_of(output_ptr, output_strides, 0, head, start, UNIT)
    lse_rows = lse_ptr + head * num_queries + start
    finish_rows(output, total, row_max, output_rows, lse_rows, rows, is_row, output_strides, HEAD_DIM, DIM_TILES, UNIT)


def num_blocks(num_rows: int, block: int) -> int:
    """At least as many blocks as cover the rows; those beyond have nothing to do."""
    blocks = ceil_div(num_rows, block)
    step = max(1, power_of_two(blocks) // _STEPS)
    return ceil_div(blocks, step) * step


def forward_launch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_starts: Tensor,
    key_starts: Tensor,
    query_numbers: Tensor,
    is_causal: bool,
    scale: float,
    output: Tensor,
    lse: Tensor,
    config: RowsConfig | None = None,
) -> Launch:
    """The launch that fills `output` and `lse`.

    Args:
        query: [N, H, D], any strides; nothing is empty.
        key: [M, G, D].
        value: [M, G, D].
        query_starts: int32 [S + 1], where each sequence's queries begin, and where the last one's end.
        key_starts: the same of the keys.
        query_numbers: int32 [N], the sequence of each query; S and more for those of none.
        is_causal: query i of a sequence sees its keys j <= i + Lk - Lq.
        scale: factor of the scores.
        output: [N, H, D], to be written.
        lse: float32 [H, N], contiguous, to be written.
        config: block sizes; `rows_config`'s by default.
    """
    num_queries, heads, head_dim = query.shape
    config = config or rows_config(card_of(query.device), query.dtype, head_dim, are_keys=False)
    unit = access_unit(query, key, value, output)
    arguments = dict(
        **tensor_arguments(unit, query=query, key=key, value=value, output=output),
        lse_ptr=lse,
        query_starts_ptr=query_starts,
        key_starts_ptr=key_starts,
        query_numbers_ptr=query_numbers,
        scale=scale * LOG2_E.value,
        num_heads=heads,
        group=heads // key.shape[1],
        num_queries=num_queries,
        num_sequences=query_starts.shape[0] - 1,
        HEAD_DIM=head_dim,
        DIM_TILES=head_tiles(query.dtype, head_dim, is_cut=True),
        UNIT=unit,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        NUM_STAGES=config.num_stages,
        IS_CAUSAL=is_causal,
    )
    programs = num_blocks(num_queries, config.block_m) * heads
    return Launch(packed_fwd_kernel, programs, arguments, config.num_warps, config.num_stages)
