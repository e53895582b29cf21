"""Attention of a few queries to many keys: the keys of a head are shared out among programs, whose partial sums a
second kernel adds up.

One decoding step has a query for each head, and keys and values are all that it reads. A program per head leaves most
of a card idle, and query heads that share keys would each read them again. Here the queries of all heads of a group are
the rows of one block, so that keys and values are read once, and a share of the keys goes to each program (split-K,
"Flash-Decoding"). Shares are added in a fixed order, without atomics.

Shapes: B batch, H query heads, G key/value heads, Lq / Lk lengths, D head_dim, S shares, R = B * H * Lq rows.
"""

# What Triton compiles is not what it looks like to a type checker.
# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportReturnType=false
from __future__ import annotations

import triton
import triton.language as tl

from mmattn.kernels.blocks import (
    add_products,
    head_of,
    load_rows,
    load_rows_of,
    online_softmax,
    place,
    row_products,
    rows_of,
    scaled_rows,
    store_rows,
    usable_keys,
    zero_blocks,
)
from mmattn.kernels.launch import SIZES


@triton.jit
def _allowed_keys(
    keys, is_key, is_row, last_keys, positions, attn_mask_rows, attn_mask_strides,
    IS_CAUSAL: tl.constexpr, HAS_ATTN_MASK: tl.constexpr,
):  # fmt: skip
    """(who may attend to whom [M, N], which keys [N] anybody may attend to); `keys` and `last_keys` count alike."""
    allowed = is_key[None, :]
    if IS_CAUSAL:
        allowed = allowed & (keys[None, :] <= last_keys[:, None])
    if HAS_ATTN_MASK:
        allowed = allowed & is_row[:, None]
        pointers = attn_mask_rows + (positions * attn_mask_strides[2])[:, None] + (keys * attn_mask_strides[3])[None, :]
        allowed = allowed & (tl.load(pointers, mask=allowed, other=0) != 0)
        is_key = tl.max(allowed.to(tl.int32), axis=0) != 0
    return allowed, is_key


@triton.jit
def place_of_share(
    query_ptr, query_strides, num_heads, group, num_queries, num_chunks, num_splits,
    HEAD_DIM: tl.constexpr, DIM_TILES: tl.constexpr, UNIT: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """(batch row, key/value head, share of the keys, rows [M] among the queries of its group, which of them there are,
    their positions, their heads, the queries) of this program; see `decode_kernel`."""
    kv_head, part, batch = place(num_heads, num_chunks * num_splits)
    batch = batch.to(tl.int64)
    chunk = part % num_chunks
    split = part // num_chunks
    rows = chunk * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row = rows < group * num_queries
    positions = rows % num_queries
    heads = kv_head * group + rows // num_queries
    query_rows = query_ptr + ((batch * query_strides[0] + heads * query_strides[1]) * UNIT)[:, None]
    query = load_rows(query_rows, positions, is_row, query_strides, HEAD_DIM, DIM_TILES, UNIT)
    return batch, kv_head, split, rows, is_row, positions, heads, query


@triton.jit
def finish_share(
    output, total, row_max, output_ptr, partial_ptr, statistics_ptr, output_strides, partial_strides,
    batch, kv_head, split, rows, is_row, positions, heads, num_heads, group, num_queries, num_splits, num_rows,
    HEAD_DIM: tl.constexpr, DIM_TILES: tl.constexpr, UNIT: tl.constexpr, IS_SPLIT: tl.constexpr,
):  # fmt: skip
    """Write the output, or, if keys are shared out, what `add_splits_kernel` adds up."""
    if IS_SPLIT:
        # In memory the rows of a group follow one another.
        first_row = split.to(tl.int64) * num_rows + (batch * num_heads + kv_head) * group * num_queries
        store_rows(
            partial_ptr + first_row * HEAD_DIM, output, rows, is_row, partial_strides, HEAD_DIM, DIM_TILES, 1
        )  # fmt: skip
        places = statistics_ptr + first_row + rows
        tl.store(places, row_max, mask=is_row)
        tl.store(places + num_splits.to(tl.int64) * num_rows, total, mask=is_row)
    else:
        total = tl.where(total == 0.0, 1.0, total)
        output_rows = output_ptr + ((batch * output_strides[0] + heads * output_strides[1]) * UNIT)[:, None]
        store_rows(
            output_rows, scaled_rows(output, 1.0 / total, DIM_TILES), positions, is_row, output_strides,
            HEAD_DIM, DIM_TILES, UNIT,
        )  # fmt: skip


@triton.jit(do_not_specialize=(*SIZES, "blocks_per_split", "num_rows"))
def decode_kernel(
    query_ptr, key_ptr, value_ptr, output_ptr, partial_ptr, statistics_ptr, key_mask_ptr, attn_mask_ptr,
    query_strides, key_strides, value_strides, output_strides, partial_strides, key_mask_strides, attn_mask_strides,
    scale, num_heads, group, num_queries, num_keys, num_chunks, num_splits, blocks_per_split, num_rows,
    HEAD_DIM: tl.constexpr, DIM_TILES: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, IS_SPLIT: tl.constexpr,
    IS_CAUSAL: tl.constexpr, HAS_KEY_MASK: tl.constexpr, HAS_ATTN_MASK: tl.constexpr,
):  # fmt: skip
    """A program has one key/value head (`num_heads` of them) of one batch row, a share of its keys, and BLOCK_M of the
    queries of its group: all queries of the first head, then of the second. It walks over the keys.

    Writes the output, or, if keys are shared out, partial sums [S, R, D], largest scores and sums of weights [2, S, R].
    """
    batch, kv_head, split, rows, is_row, positions, heads, query = place_of_share(
        query_ptr, query_strides, num_heads, group, num_queries, num_chunks, num_splits,
        HEAD_DIM, DIM_TILES, UNIT, BLOCK_M,
    )  # fmt: skip
    mask_rows = attn_mask_ptr + (batch * attn_mask_strides[0] + heads * attn_mask_strides[1])[:, None]
    key_mask_row = head_of(key_mask_ptr, key_mask_strides, batch, kv_head, 1)
    # Aligned at the last query and the last key.
    last_keys = positions + (num_keys - num_queries)

    row_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    total = tl.full([BLOCK_M], 0.0, dtype=tl.float32)
    output = zero_blocks(BLOCK_M, DIM_TILES)
    keys = tl.arange(0, BLOCK_N)
    first = split * blocks_per_split
    for block in tl.range(first, tl.minimum(first + blocks_per_split, tl.cdiv(num_keys, BLOCK_N))):
        start = block * BLOCK_N
        far = start.to(tl.int64)
        is_key = usable_keys(
            keys, num_keys - start, key_mask_row + far * key_mask_strides[2], key_mask_strides[2], HAS_KEY_MASK
        )  # fmt: skip
        allowed, is_key = _allowed_keys(
            keys, is_key, is_row, last_keys - start, positions, mask_rows + far * attn_mask_strides[3],
            attn_mask_strides, IS_CAUSAL, HAS_ATTN_MASK,
        )  # fmt: skip
        key = load_rows_of(key_ptr, key_strides, batch, kv_head, far, keys, is_key, HEAD_DIM, DIM_TILES, UNIT)
        value = load_rows_of(value_ptr, value_strides, batch, kv_head, far, keys, is_key, HEAD_DIM, DIM_TILES, UNIT)
        scores = tl.where(allowed, row_products(query, key, DIM_TILES) * scale, float("-inf"))
        weights, factors, total, row_max = online_softmax(scores, total, row_max)
        output = add_products(scaled_rows(output, factors, DIM_TILES), weights, value, DIM_TILES)

    finish_share(
        output, total, row_max, output_ptr, partial_ptr, statistics_ptr, output_strides, partial_strides,
        batch, kv_head, split, rows, is_row, positions, heads, num_heads, group, num_queries, num_splits, num_rows,
        HEAD_DIM, DIM_TILES, UNIT, IS_SPLIT,
    )  # fmt: skip


@triton.jit(do_not_specialize=(*SIZES, "num_rows"))
def add_splits_kernel(
    partial_ptr, statistics_ptr, output_ptr, output_strides, num_heads, num_queries, num_splits, num_rows,
    HEAD_DIM: tl.constexpr, DIM_TILES: tl.constexpr, UNIT: tl.constexpr,
    MOST_SPLITS: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """A program adds up the shares of one row, BLOCK_S at a time; a row without keys gives zeros."""
    row = tl.program_id(0)
    position = row % num_queries
    head = row // num_queries % num_heads
    batch = (row // num_queries // num_heads).to(tl.int64)
    statistics = statistics_ptr + row
    rest = num_splits.to(tl.int64) * num_rows

    splits = tl.arange(0, MOST_SPLITS)
    offsets = splits.to(tl.int64) * num_rows
    maxima = tl.load(statistics + offsets, mask=splits < num_splits, other=float("-inf"))
    totals = tl.load(statistics + rest + offsets, mask=splits < num_splits, other=0.0)
    row_max = tl.max(maxima, axis=0)
    row_max = tl.where(row_max == float("-inf"), 0.0, row_max)
    total = tl.sum(totals * tl.exp2(maxima - row_max), axis=0)
    total = tl.where(total == 0.0, 1.0, total)

    output_row = rows_of(output_ptr, output_strides, batch, head, position.to(tl.int64), UNIT)
    for d in tl.static_range(len(DIM_TILES)):
        columns = DIM_TILES[d][0] + tl.arange(0, DIM_TILES[d][1])
        is_column = columns < HEAD_DIM
        output = tl.full([DIM_TILES[d][1]], 0.0, dtype=tl.float32)
        for first in tl.static_range(0, MOST_SPLITS, BLOCK_S):
            some = first + tl.arange(0, BLOCK_S)
            is_some = some < num_splits
            places = some.to(tl.int64) * num_rows
            weights = tl.exp2(tl.load(statistics + places, mask=is_some, other=float("-inf")) - row_max)
            partial = tl.load(
                partial_ptr + ((places + row) * HEAD_DIM)[:, None] + columns[None, :],
                mask=is_some[:, None] & is_column[None, :], other=0.0,
            )  # fmt: skip
            output += tl.sum(partial * weights[:, None], axis=0)
        output = (output / total).to(output_ptr.dtype.element_ty)
        tl.store(output_row + columns * output_strides[3], output, mask=is_column)
