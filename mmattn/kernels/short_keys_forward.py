"""Attention over short keys, forward: softmax(scale * query @ key^T) @ value, and the log-sum-exp of each row.

Long-key kernels walk over key blocks and rescale what they have whenever a larger score turns up, in tiles of 128 keys
or more. Here all keys of a head (up to `resident_keys`) are held by a program, in blocks of 16 at the smallest: scores
of a row are complete before its softmax begins, keys and values are read once for several query blocks, and 77 keys
cost 80. More keys are walked over in blocks of `key_block` with the online softmax (arXiv 1805.02867); only what is
left over at the end is cut finer.

Shapes: B batch, H query heads, G key/value heads, Lq / Lk lengths, D head_dim.
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
    begin,
    finish_rows,
    head_of,
    load_keys,
    load_rows,
    load_rows_of,
    masked_scores,
    online_softmax,
    place,
    rows_of,
    scaled_rows,
    score_block,
    zero_blocks,
)
from mmattn.kernels.launch import (
    SIZES,
    Launch,
    access_unit,
    card_of,
    early_argument,
    mask_arguments,
    tensor_arguments,
    walk_over_keys,
)
from mmattn.kernels.short_keys_configs import ForwardConfig, forward_config, head_tiles, key_block, resident_keys
from mmattn.kernels.tiles import ceil_div, one_tile, padded, tiles_of


@triton.jit
def _attend_all(
    query, key, value, is_key, rows, is_row, attn_mask_rows, attn_mask_strides, scale,
    BLOCK_M: tl.constexpr, DIM_TILES: tl.constexpr, KEY_TILES: tl.constexpr, HAS_ATTN_MASK: tl.constexpr,
):  # fmt: skip
    """(weighted sum of values, sum of weights, largest score) of each row, over all keys at once."""
    scores = ()
    row_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    for n in tl.static_range(len(KEY_TILES)):
        keys = KEY_TILES[n][0] + tl.arange(0, KEY_TILES[n][1])
        part = masked_scores(
            query, key[n], scale, rows, is_row, keys, is_key[n], attn_mask_rows, attn_mask_strides,
            HAS_ATTN_MASK, DIM_TILES,
        )  # fmt: skip
        row_max = tl.maximum(row_max, tl.max(part, axis=1))
        scores = scores + (part,)
    # Of a row without keys: 0 instead of -inf, whose difference to itself is NaN.
    row_max = tl.where(row_max == float("-inf"), 0.0, row_max)
    total = tl.full([BLOCK_M], 0.0, dtype=tl.float32)
    output = zero_blocks(BLOCK_M, DIM_TILES)
    for n in tl.static_range(len(KEY_TILES)):
        weights = tl.exp2(scores[n] - row_max[:, None])
        total += tl.sum(weights, axis=1)
        output = add_products(output, weights, value[n], DIM_TILES)
    return output, total, row_max


@triton.jit
def attend_resident(
    query_ptr, output_ptr, lse_ptr, attn_mask_ptr, query_strides, output_strides, attn_mask_strides,
    key, value, is_key, scale, num_heads, num_queries, batch, head, start,
    HEAD_DIM: tl.constexpr, DIM_TILES: tl.constexpr, KEY_TILES: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr, HAS_ATTN_MASK: tl.constexpr,
):  # fmt: skip
    """Attend with BLOCK_M queries from `start` to all keys and write what comes of it: (query, largest score, sum of
    weights) of each row."""
    start = start.to(tl.int64)
    rows = tl.arange(0, BLOCK_M)
    is_row = rows < num_queries - start
    query = load_rows_of(query_ptr, query_strides, batch, head, start, rows, is_row, HEAD_DIM, DIM_TILES, UNIT)
    attn_mask_rows = rows_of(attn_mask_ptr, attn_mask_strides, batch, head, start, 1)
    output, total, row_max = _attend_all(
        query, key, value, is_key, rows, is_row, attn_mask_rows, attn_mask_strides, scale,
        BLOCK_M, DIM_TILES, KEY_TILES, HAS_ATTN_MASK,
    )  # fmt: skip
    output_rows = rows_of(output_ptr, output_strides, batch, head, start, UNIT)
    lse_rows = lse_ptr + (batch * num_heads + head) * num_queries + start
    finish_rows(output, total, row_max, output_rows, lse_rows, rows, is_row, output_strides, HEAD_DIM, DIM_TILES, UNIT)
    return query, row_max, total


@triton.jit(do_not_specialize=SIZES)
def resident_fwd_kernel(
    query_ptr, key_ptr, value_ptr, output_ptr, lse_ptr, key_mask_ptr, attn_mask_ptr,
    query_strides, key_strides, value_strides, output_strides, key_mask_strides, attn_mask_strides,
    scale, num_heads, group, num_queries, num_keys, num_chunks,
    HEAD_DIM: tl.constexpr, DIM_TILES: tl.constexpr, KEY_TILES: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr, ROW_BLOCKS: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr, HAS_ATTN_MASK: tl.constexpr, IS_EARLY: tl.constexpr,
):  # fmt: skip
    """A program has one head of one batch row, all its keys, and ROW_BLOCKS * BLOCK_M queries."""
    begin(IS_EARLY)
    head, chunk, batch = place(num_heads, num_chunks)
    batch = batch.to(tl.int64)
    key, value, is_key = load_keys(
        key_ptr, value_ptr, key_mask_ptr, key_strides, value_strides, key_mask_strides, batch, head // group, 0,
        num_keys, KEY_TILES, HEAD_DIM, DIM_TILES, UNIT, HAS_KEY_MASK,
    )  # fmt: skip
    for block in tl.range(ROW_BLOCKS):
        attend_resident(
            query_ptr, output_ptr, lse_ptr, attn_mask_ptr, query_strides, output_strides, attn_mask_strides,
            key, value, is_key, scale, num_heads, num_queries, batch, head, (chunk * ROW_BLOCKS + block) * BLOCK_M,
            HEAD_DIM, DIM_TILES, KEY_TILES, UNIT, BLOCK_M, HAS_ATTN_MASK,
        )  # fmt: skip


@triton.jit
def _attend_block(
    output, total, row_max, query, rows, is_row, first,
    key_base, value_base, key_mask_row, attn_mask_rows,
    key_strides, value_strides, key_mask_strides, attn_mask_strides, scale, num_keys,
    NUM_KEYS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_TILES: tl.constexpr, UNIT: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr, HAS_ATTN_MASK: tl.constexpr,
):  # fmt: skip
    """Online softmax over one more block of NUM_KEYS keys from `first`."""
    scores, _key, keys, is_key = score_block(
        query, rows, is_row, first, key_base, key_mask_row, attn_mask_rows,
        key_strides, key_mask_strides, attn_mask_strides, scale, num_keys,
        NUM_KEYS, HEAD_DIM, DIM_TILES, UNIT, HAS_KEY_MASK, HAS_ATTN_MASK,
    )  # fmt: skip
    weights, factors, total, row_max = online_softmax(scores, total, row_max)
    value = load_rows(value_base, keys, is_key, value_strides, HEAD_DIM, DIM_TILES, UNIT)
    output = add_products(scaled_rows(output, factors, DIM_TILES), weights, value, DIM_TILES)
    return output, total, row_max


@triton.jit
def attend_streamed(
    query_ptr, key_ptr, value_ptr, output_ptr, lse_ptr, key_mask_ptr, attn_mask_ptr,
    query_strides, key_strides, value_strides, output_strides, key_mask_strides, attn_mask_strides,
    scale, num_heads, group, num_queries, num_keys, batch, head, start,
    HEAD_DIM: tl.constexpr, DIM_TILES: tl.constexpr, LAST_TILES: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WHOLE_BLOCKS: tl.constexpr, NUM_STAGES: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr, HAS_ATTN_MASK: tl.constexpr,
):  # fmt: skip
    """As `attend_resident`, walking over the keys."""
    start = start.to(tl.int64)
    kv_head = head // group
    key_base = head_of(key_ptr, key_strides, batch, kv_head, UNIT)
    value_base = head_of(value_ptr, value_strides, batch, kv_head, UNIT)
    key_mask_row = head_of(key_mask_ptr, key_mask_strides, batch, kv_head, 1)
    rows = tl.arange(0, BLOCK_M)
    is_row = rows < num_queries - start
    query = load_rows_of(query_ptr, query_strides, batch, head, start, rows, is_row, HEAD_DIM, DIM_TILES, UNIT)
    attn_mask_rows = rows_of(attn_mask_ptr, attn_mask_strides, batch, head, start, 1)
    row_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    total = tl.full([BLOCK_M], 0.0, dtype=tl.float32)
    output = zero_blocks(BLOCK_M, DIM_TILES)
    for block in tl.range(WHOLE_BLOCKS, num_stages=NUM_STAGES):
        output, total, row_max = _attend_block(
            output, total, row_max, query, rows, is_row, block * BLOCK_N,
            key_base, value_base, key_mask_row, attn_mask_rows,
            key_strides, value_strides, key_mask_strides, attn_mask_strides, scale, num_keys,
            BLOCK_N, HEAD_DIM, DIM_TILES, UNIT, HAS_KEY_MASK, HAS_ATTN_MASK,
        )  # fmt: skip
    for n in tl.static_range(len(LAST_TILES)):
        output, total, row_max = _attend_block(
            output, total, row_max, query, rows, is_row, WHOLE_BLOCKS * BLOCK_N + LAST_TILES[n][0],
            key_base, value_base, key_mask_row, attn_mask_rows,
            key_strides, value_strides, key_mask_strides, attn_mask_strides, scale, num_keys,
            LAST_TILES[n][1], HEAD_DIM, DIM_TILES, UNIT, HAS_KEY_MASK, HAS_ATTN_MASK,
        )  # fmt: skip
    output_rows = rows_of(output_ptr, output_strides, batch, head, start, UNIT)
    lse_rows = lse_ptr + (batch * num_heads + head) * num_queries + start
    row_max = tl.where(row_max == float("-inf"), 0.0, row_max)
    finish_rows(output, total, row_max, output_rows, lse_rows, rows, is_row, output_strides, HEAD_DIM, DIM_TILES, UNIT)
    return query, row_max, total


@triton.jit(do_not_specialize=SIZES)
def streamed_fwd_kernel(
    query_ptr, key_ptr, value_ptr, output_ptr, lse_ptr, key_mask_ptr, attn_mask_ptr,
    query_strides, key_strides, value_strides, output_strides, key_mask_strides, attn_mask_strides,
    scale, num_heads, group, num_queries, num_keys, num_chunks,
    HEAD_DIM: tl.constexpr, DIM_TILES: tl.constexpr, LAST_TILES: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WHOLE_BLOCKS: tl.constexpr, NUM_STAGES: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr, HAS_ATTN_MASK: tl.constexpr, IS_EARLY: tl.constexpr,
):  # fmt: skip
    """A program has one head of one batch row and BLOCK_M queries, and walks over the keys."""
    begin(IS_EARLY)
    head, chunk, batch = place(num_heads, num_chunks)
    attend_streamed(
        query_ptr, key_ptr, value_ptr, output_ptr, lse_ptr, key_mask_ptr, attn_mask_ptr,
        query_strides, key_strides, value_strides, output_strides, key_mask_strides, attn_mask_strides,
        scale, num_heads, group, num_queries, num_keys, batch.to(tl.int64), head, chunk * BLOCK_M,
        HEAD_DIM, DIM_TILES, LAST_TILES, UNIT, BLOCK_M, BLOCK_N, WHOLE_BLOCKS, NUM_STAGES, HAS_KEY_MASK, HAS_ATTN_MASK,
    )  # fmt: skip


def forward_launch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    attn_mask: Tensor | None,
    scale: float,
    output: Tensor,
    lse: Tensor,
    config: ForwardConfig | None = None,
) -> Launch:
    """The launch that fills `output` and `lse`.

    Args:
        query: [B, H, Lq, D], any strides; nothing is empty.
        key: [B, G, Lk, D].
        value: [B, G, Lk, D].
        key_mask: boolean, broadcastable to [B, G, Lk]; keys left out are not read.
        attn_mask: boolean, broadcastable to [B, H, Lq, Lk].
        scale: factor of the scores.
        output: [B, H, Lq, D], to be written.
        lse: float32 [B, H, Lq], contiguous, to be written.
        config: block sizes; the table's by default.
    """
    batch, heads, num_queries, head_dim = query.shape
    kv_heads, num_keys = key.shape[1:3]
    card = card_of(query.device)
    config = config or forward_config(card, query.dtype, head_dim, num_keys, num_queries, batch * heads)
    is_resident = padded(num_keys) <= resident_keys(card, query.dtype)
    num_chunks = ceil_div(num_queries, config.block_m * (config.row_blocks if is_resident else 1))
    unit = access_unit(query, key, value, output)
    arguments = dict(
        **tensor_arguments(unit, query=query, key=key, value=value, output=output),
        **mask_arguments(query, key, key_mask, attn_mask),
        lse_ptr=lse,
        scale=scale * LOG2_E.value,
        num_heads=heads,
        group=heads // kv_heads,
        num_queries=num_queries,
        num_keys=num_keys,
        num_chunks=num_chunks,
        HEAD_DIM=head_dim,
        DIM_TILES=head_tiles(query.dtype, head_dim, config.is_head_cut),
        UNIT=unit,
        BLOCK_M=config.block_m,
        **early_argument(query.device),
    )
    if is_resident:
        kernel = resident_fwd_kernel
        key_tiles = tiles_of(num_keys) if config.are_keys_cut else one_tile(num_keys)
        arguments |= {"KEY_TILES": key_tiles, "ROW_BLOCKS": config.row_blocks}
    else:
        kernel = streamed_fwd_kernel
        arguments |= walk_over_keys(num_keys, key_block(query.dtype)) | {"NUM_STAGES": config.num_stages}
    return Launch(kernel, num_chunks * heads * batch, arguments, config.num_warps, config.num_stages)
