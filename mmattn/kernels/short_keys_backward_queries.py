"""Attention over short keys, backward, of the queries alone: for keys whose gradients do not fit into one program.

Shapes: B batch, H query heads, G key/value heads, Lq / Lk lengths, D head_dim.
"""

# What Triton compiles is not what it looks like to a type checker.
# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportReturnType=false
from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from mmattn.kernels.blocks import (
    LOG2_E,
    add_products,
    head_of,
    load_lse,
    load_rows,
    load_rows_of,
    place,
    row_products,
    row_sums,
    rows_of,
    score_block,
    store_scaled,
    zero_blocks,
)
from mmattn.kernels.launch import SIZES, Launch, tensor_arguments, walk_over_keys
from mmattn.kernels.short_keys_configs import BackwardConfig, key_block
from mmattn.kernels.tiles import ceil_div


@triton.jit
def _add_block(
    grad_query, query, grad_output, lse, delta, rows, is_row, first,
    key_base, value_base, key_mask_row, attn_mask_rows,
    key_strides, value_strides, key_mask_strides, attn_mask_strides, scale, num_keys,
    NUM_KEYS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_TILES: tl.constexpr, UNIT: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr, HAS_ATTN_MASK: tl.constexpr,
):  # fmt: skip
    """What NUM_KEYS keys from `first` add to the gradient of a block of queries."""
    scores, key, keys, is_key = score_block(
        query, rows, is_row, first, key_base, key_mask_row, attn_mask_rows,
        key_strides, key_mask_strides, attn_mask_strides, scale * LOG2_E, num_keys,
        NUM_KEYS, HEAD_DIM, DIM_TILES, UNIT, HAS_KEY_MASK, HAS_ATTN_MASK,
    )  # fmt: skip
    value = load_rows(value_base, keys, is_key, value_strides, HEAD_DIM, DIM_TILES, UNIT)
    weights = tl.exp2(scores - lse[:, None])
    grad_scores = weights * (row_products(grad_output, value, DIM_TILES) - delta[:, None])
    return add_products(grad_query, grad_scores, key, DIM_TILES)


@triton.jit(do_not_specialize=SIZES)
def queries_bwd_kernel(
    query_ptr, key_ptr, value_ptr, output_ptr, grad_output_ptr, lse_ptr, delta_ptr, grad_query_ptr,
    key_mask_ptr, attn_mask_ptr,
    query_strides, key_strides, value_strides, output_strides, grad_output_strides, grad_query_strides,
    key_mask_strides, attn_mask_strides,
    scale, num_heads, group, num_queries, num_keys, num_chunks,
    HEAD_DIM: tl.constexpr, DIM_TILES: tl.constexpr, LAST_TILES: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WHOLE_BLOCKS: tl.constexpr, NUM_STAGES: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr, HAS_ATTN_MASK: tl.constexpr,
):  # fmt: skip
    """Gradients of a block of queries over all keys, and delta [B, H, Lq] from the output."""
    head, chunk, batch = place(num_heads, num_chunks)
    start = (chunk * BLOCK_M).to(tl.int64)
    batch = batch.to(tl.int64)
    key_base = head_of(key_ptr, key_strides, batch, head // group, UNIT)
    value_base = head_of(value_ptr, value_strides, batch, head // group, UNIT)
    key_mask_row = head_of(key_mask_ptr, key_mask_strides, batch, head // group, 1)
    rows = tl.arange(0, BLOCK_M)
    is_row = rows < num_queries - start
    query = load_rows_of(query_ptr, query_strides, batch, head, start, rows, is_row, HEAD_DIM, DIM_TILES, UNIT)
    output = load_rows_of(output_ptr, output_strides, batch, head, start, rows, is_row, HEAD_DIM, DIM_TILES, UNIT)
    grad_output = load_rows_of(
        grad_output_ptr, grad_output_strides, batch, head, start, rows, is_row, HEAD_DIM, DIM_TILES, UNIT
    )  # fmt: skip
    row_offset = (batch * num_heads + head) * num_queries + start
    lse = load_lse(lse_ptr + row_offset, rows, is_row)
    delta = row_sums(output, grad_output, BLOCK_M, DIM_TILES)
    tl.store(delta_ptr + row_offset + rows, delta, mask=is_row)
    attn_mask_rows = rows_of(attn_mask_ptr, attn_mask_strides, batch, head, start, 1)
    grad_query = zero_blocks(BLOCK_M, DIM_TILES)
    for block in tl.range(WHOLE_BLOCKS, num_stages=NUM_STAGES):
        grad_query = _add_block(
            grad_query, query, grad_output, lse, delta, rows, is_row, block * BLOCK_N,
            key_base, value_base, key_mask_row, attn_mask_rows,
            key_strides, value_strides, key_mask_strides, attn_mask_strides, scale, num_keys,
            BLOCK_N, HEAD_DIM, DIM_TILES, UNIT, HAS_KEY_MASK, HAS_ATTN_MASK,
        )  # fmt: skip
    for n in tl.static_range(len(LAST_TILES)):
        grad_query = _add_block(
            grad_query, query, grad_output, lse, delta, rows, is_row, WHOLE_BLOCKS * BLOCK_N + LAST_TILES[n][0],
            key_base, value_base, key_mask_row, attn_mask_rows,
            key_strides, value_strides, key_mask_strides, attn_mask_strides, scale, num_keys,
            LAST_TILES[n][1], HEAD_DIM, DIM_TILES, UNIT, HAS_KEY_MASK, HAS_ATTN_MASK,
        )  # fmt: skip
    grad_query_rows = rows_of(grad_query_ptr, grad_query_strides, batch, head, start, UNIT)
    store_scaled(
        grad_query_rows, grad_query, rows, is_row, scale, grad_query_strides, BLOCK_M, HEAD_DIM, DIM_TILES, UNIT
    )


def queries_launch(shared: dict[str, Any], output: Tensor, unit: int, config: BackwardConfig) -> Launch:
    """The launch that fills grad_query and delta; `shared` are the arguments that both kernels take."""
    query, num_keys = shared["query_ptr"], shared["num_keys"]
    num_chunks = ceil_div(query.shape[2], config.block_m)
    arguments = shared | {
        **tensor_arguments(unit, output=output),
        "num_chunks": num_chunks,
        **walk_over_keys(num_keys, key_block(query.dtype)),
    }
    programs = num_chunks * query.shape[0] * query.shape[1]
    return Launch(queries_bwd_kernel, programs, arguments, config.num_warps, config.num_stages)
