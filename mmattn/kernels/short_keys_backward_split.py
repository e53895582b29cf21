"""Attention over short keys, backward, by programs that compute one gradient each.

For few queries. The kernel that computes all three gradients in one program keeps sums for keys and values in most of
its registers, and each of its programs writes them in float32. Here programs for keys and for values walk over more
queries, up to all of a head, where nothing is left to add; those for queries have a block. Scores are computed three
times for it, and the products of gradients with values twice.

    dQ: P, dP, delta, dS -> scale * dS @ K      dK: P, dP, delta, dS -> scale * dS^T @ Q      dV: P -> P^T @ dO

Shapes: B batch, H query heads, G key/value heads, Lq / Lk lengths, D head_dim, S splits.
"""

# What Triton compiles is not what it looks like to a type checker.
# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportReturnType=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmattn.kernels.blocks import (
    LOG2_E,
    add_products,
    head_of,
    load_keys,
    load_lse,
    load_rows_of,
    masked_scores,
    place,
    row_products,
    rows_of,
    store_scaled,
    zero_blocks,
)
from mmattn.kernels.launch import (
    SIZES,
    Launch,
    access_unit,
    card_of,
    mask_arguments,
    tensor_arguments,
)
from mmattn.kernels.short_keys_backward_sums import sum_launch
from mmattn.kernels.short_keys_configs import SplitConfig, head_tiles
from mmattn.kernels.tiles import ceil_div, tiles_of

KEYS, VALUES, QUERIES = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def _weights(
    query_ptr, grad_output_ptr, lse_ptr, attn_mask_ptr,
    query_strides, grad_output_strides, attn_mask_strides,
    key, value, is_key, scale, batch, head, num_heads, num_queries, start, rows, is_row,
    HEAD_DIM: tl.constexpr, DIM_TILES: tl.constexpr, KEY_TILES: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr, HAS_ATTN_MASK: tl.constexpr, WHAT: tl.constexpr,
):  # fmt: skip
    """(query, dO, P, dP, delta) of a block of queries; of P and dP an item [M, N] for each block of keys. dP and delta
    are of no use to the values' gradients, and not computed for them."""
    query = load_rows_of(query_ptr, query_strides, batch, head, start, rows, is_row, HEAD_DIM, DIM_TILES, UNIT)
    grad_output = load_rows_of(
        grad_output_ptr, grad_output_strides, batch, head, start, rows, is_row, HEAD_DIM, DIM_TILES, UNIT
    )  # fmt: skip
    lse = load_lse(lse_ptr + (batch * num_heads + head) * num_queries + start, rows, is_row)
    attn_mask_rows = rows_of(attn_mask_ptr, attn_mask_strides, batch, head, start, 1)
    weights = ()
    grad_weights = ()
    delta = tl.full([BLOCK_M], 0.0, dtype=tl.float32)
    for n in tl.static_range(len(KEY_TILES)):
        keys = KEY_TILES[n][0] + tl.arange(0, KEY_TILES[n][1])
        scores = masked_scores(
            query, key[n], scale * LOG2_E, rows, is_row, keys, is_key[n], attn_mask_rows, attn_mask_strides,
            HAS_ATTN_MASK, DIM_TILES,
        )  # fmt: skip
        part = tl.exp2(scores - lse[:, None])
        weights = weights + (part,)
        if WHAT != VALUES:
            products = row_products(grad_output, value[n], DIM_TILES)
            delta += tl.sum(part * products, axis=1)
            grad_weights = grad_weights + (products,)
    return query, grad_output, weights, grad_weights, delta


@triton.jit
def _walk(
    query_ptr, grad_output_ptr, lse_ptr, attn_mask_ptr,
    query_strides, grad_output_strides, attn_mask_strides,
    key, value, is_key, scale, batch, head, num_heads, num_queries, first_block,
    HEAD_DIM: tl.constexpr, DIM_TILES: tl.constexpr, KEY_TILES: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr, ROW_BLOCKS: tl.constexpr, NUM_STAGES: tl.constexpr, HAS_ATTN_MASK: tl.constexpr,
    WHAT: tl.constexpr,
):  # fmt: skip
    """Sums [N, D] over ROW_BLOCKS blocks of queries: of the keys' gradients / scale, or of the values'."""
    sums = ()
    for n in tl.static_range(len(KEY_TILES)):
        sums = sums + (zero_blocks(KEY_TILES[n][1], DIM_TILES),)
    rows = tl.arange(0, BLOCK_M)
    for block in tl.range(ROW_BLOCKS, num_stages=NUM_STAGES):
        start = ((first_block + block) * BLOCK_M).to(tl.int64)
        is_row = rows < num_queries - start
        query, grad_output, weights, grad_weights, delta = _weights(
            query_ptr, grad_output_ptr, lse_ptr, attn_mask_ptr,
            query_strides, grad_output_strides, attn_mask_strides,
            key, value, is_key, scale, batch, head, num_heads, num_queries, start, rows, is_row,
            HEAD_DIM, DIM_TILES, KEY_TILES, UNIT, BLOCK_M, HAS_ATTN_MASK, WHAT,
        )  # fmt: skip
        new_sums = ()
        for n in tl.static_range(len(KEY_TILES)):
            if WHAT == KEYS:
                left = (weights[n] * (grad_weights[n] - delta[:, None])).to(query[0].dtype)
                new_sums = new_sums + (add_products(sums[n], left.T, query, DIM_TILES),)
            else:
                left = weights[n].to(query[0].dtype)
                new_sums = new_sums + (add_products(sums[n], left.T, grad_output, DIM_TILES),)
        sums = new_sums
    return sums


@triton.jit
def _store_sums(
    sums_ptr, sums, factor, strides, which, part, batch, head, num_batches, num_heads, num_keys,
    KEY_TILES: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_TILES: tl.constexpr, IS_WHOLE: tl.constexpr,
):  # fmt: skip
    """Whole, they are the gradient itself; else partials [S, 2, B, H, Lk, D], keys then values."""
    if IS_WHOLE:
        base = head_of(sums_ptr, strides, batch, head, 1)
    else:
        matrix = ((part * 2 + which) * num_batches + batch) * num_heads + head
        base = sums_ptr + matrix * num_keys * HEAD_DIM
    for n in tl.static_range(len(KEY_TILES)):
        keys = KEY_TILES[n][0] + tl.arange(0, KEY_TILES[n][1])
        store_scaled(
            base, sums[n], keys, keys < num_keys, factor, strides, KEY_TILES[n][1], HEAD_DIM, DIM_TILES, 1
        )  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def split_bwd_kernel(
    query_ptr, key_ptr, value_ptr, grad_output_ptr, lse_ptr, grad_query_ptr, key_sums_ptr, value_sums_ptr,
    key_mask_ptr, attn_mask_ptr,
    query_strides, key_strides, value_strides, grad_output_strides, grad_query_strides,
    key_sums_strides, value_sums_strides, key_mask_strides, attn_mask_strides,
    scale, num_batches, num_heads, group, num_queries, num_keys, num_splits,
    HEAD_DIM: tl.constexpr, DIM_TILES: tl.constexpr, KEY_TILES: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr, ROW_BLOCKS: tl.constexpr, NUM_STAGES: tl.constexpr, IS_WHOLE: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr, HAS_ATTN_MASK: tl.constexpr,
):  # fmt: skip
    """One gradient of one head: first the programs of all keys' gradients, which take longest, then the values', then
    the queries'."""
    head, batch, part = place(num_heads, num_batches)
    batch = batch.to(tl.int64)
    key, value, is_key = load_keys(
        key_ptr, value_ptr, key_mask_ptr, key_strides, value_strides, key_mask_strides, batch, head // group, 0,
        num_keys, KEY_TILES, HEAD_DIM, DIM_TILES, UNIT, HAS_KEY_MASK,
    )  # fmt: skip
    if part < num_splits:
        sums = _walk(
            query_ptr, grad_output_ptr, lse_ptr, attn_mask_ptr,
            query_strides, grad_output_strides, attn_mask_strides,
            key, value, is_key, scale, batch, head, num_heads, num_queries, part * ROW_BLOCKS,
            HEAD_DIM, DIM_TILES, KEY_TILES, UNIT, BLOCK_M, ROW_BLOCKS, NUM_STAGES, HAS_ATTN_MASK, KEYS,
        )  # fmt: skip
        _store_sums(
            key_sums_ptr, sums, scale, key_sums_strides, 0, part, batch, head, num_batches, num_heads, num_keys,
            KEY_TILES, HEAD_DIM, DIM_TILES, IS_WHOLE,
        )  # fmt: skip
    elif part < 2 * num_splits:
        part -= num_splits
        sums = _walk(
            query_ptr, grad_output_ptr, lse_ptr, attn_mask_ptr,
            query_strides, grad_output_strides, attn_mask_strides,
            key, value, is_key, scale, batch, head, num_heads, num_queries, part * ROW_BLOCKS,
            HEAD_DIM, DIM_TILES, KEY_TILES, UNIT, BLOCK_M, ROW_BLOCKS, NUM_STAGES, HAS_ATTN_MASK, VALUES,
        )  # fmt: skip
        _store_sums(
            value_sums_ptr, sums, 1.0, value_sums_strides, 1, part, batch, head, num_batches, num_heads, num_keys,
            KEY_TILES, HEAD_DIM, DIM_TILES, IS_WHOLE,
        )  # fmt: skip
    else:
        start = ((part - 2 * num_splits) * BLOCK_M).to(tl.int64)
        rows = tl.arange(0, BLOCK_M)
        is_row = rows < num_queries - start
        _, _, weights, grad_weights, delta = _weights(
            query_ptr, grad_output_ptr, lse_ptr, attn_mask_ptr,
            query_strides, grad_output_strides, attn_mask_strides,
            key, value, is_key, scale, batch, head, num_heads, num_queries, start, rows, is_row,
            HEAD_DIM, DIM_TILES, KEY_TILES, UNIT, BLOCK_M, HAS_ATTN_MASK, QUERIES,
        )  # fmt: skip
        grad_query = zero_blocks(BLOCK_M, DIM_TILES)
        for n in tl.static_range(len(KEY_TILES)):
            grad_scores = weights[n] * (grad_weights[n] - delta[:, None])
            grad_query = add_products(grad_query, grad_scores, key[n], DIM_TILES)
        store_scaled(
            rows_of(grad_query_ptr, grad_query_strides, batch, head, start, UNIT), grad_query, rows, is_row, scale,
            grad_query_strides, BLOCK_M, HEAD_DIM, DIM_TILES, UNIT,
        )  # fmt: skip


def split_launches(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lse: Tensor,
    key_mask: Tensor | None,
    attn_mask: Tensor | None,
    scale: float,
    config: SplitConfig,
    gradients: tuple[Tensor, Tensor, Tensor],
) -> tuple[Launch, ...]:
    """The launches that fill the gradients of query, key and value: one where a program has all queries of a head and
    heads share no keys, else two. Arguments as in `short_keys_backward.backward_launches`."""
    batch, heads, num_queries, head_dim = query.shape
    num_keys, group = key.shape[2], heads // key.shape[1]
    grad_query, grad_key, grad_value = gradients
    row_blocks, num_splits = _splits(query, config)
    is_whole = num_splits == 1 and group == 1
    key_sums, value_sums, adding = grad_key, grad_value, ()
    if not is_whole:
        key_sums = query.new_empty((num_splits, 2, batch, heads, num_keys, head_dim), dtype=torch.float32)
        adding = (sum_launch(key_sums, grad_key, grad_value),)
    unit = access_unit(query, key, value, grad_output, grad_query)
    arguments = dict(
        **tensor_arguments(unit, query=query, key=key, value=value, grad_output=grad_output, grad_query=grad_query),
        **(tensor_arguments(1, key_sums=key_sums, value_sums=value_sums) if is_whole else _partials(key_sums)),
        **mask_arguments(query, key, key_mask, attn_mask),
        lse_ptr=lse,
        scale=scale,
        num_batches=batch,
        num_heads=heads,
        group=group,
        num_queries=num_queries,
        num_keys=num_keys,
        num_splits=num_splits,
        HEAD_DIM=head_dim,
        DIM_TILES=head_tiles(query.dtype, head_dim, is_cut=True),
        KEY_TILES=tiles_of(num_keys),
        UNIT=unit,
        BLOCK_M=config.block_m,
        ROW_BLOCKS=row_blocks,
        NUM_STAGES=config.num_stages,
        IS_WHOLE=is_whole,
    )
    programs = heads * batch * (2 * num_splits + ceil_div(num_queries, config.block_m))
    return Launch(split_bwd_kernel, programs, arguments, config.num_warps, config.num_stages), *adding


def _partials(sums: Tensor) -> dict[str, object]:
    strides = (0, 0, sums.shape[-1], 1)
    return dict(key_sums_ptr=sums, value_sums_ptr=sums, key_sums_strides=strides, value_sums_strides=strides)


def _splits(query: Tensor, config: SplitConfig) -> tuple[int, int]:
    """(row blocks a program, splits): as many programs as the device wants, and no more.

    Row blocks are a power of two, a constant of the compiled kernel: few kernels serve all batches and lengths.
    """
    batch, heads, num_queries, _ = query.shape
    blocks = ceil_div(num_queries, config.block_m)
    wanted = card_of(query.device).processors * config.programs_per_processor
    splits = max(1, min(blocks, int((wanted / (batch * heads) - blocks) // 2)))
    each = 1
    while each * 2 <= ceil_div(blocks, splits):
        each *= 2
    return each, ceil_div(blocks, each)
