"""The backward over short keys by programs that compute one gradient each.

The package's kernel computes all three gradients in one program for each share of the queries: keys' and values' sums
take most registers, and every share writes them in float32. Here a program computes one gradient. Those for keys and
for values walk over more queries, up to all of a head, where nothing is left to add; those for queries have a block.
Scores are computed three times for it, and the products of gradients with values twice.

    dQ: P, dP, delta, dS -> scale * dS @ K      dK: P, dP, delta, dS -> scale * dS^T @ Q      dV: P -> P^T @ dO

Shapes: B batch, H query heads, G key/value heads, Lq / Lk lengths, D head_dim, S splits.
"""

# What Triton compiles is not what it looks like to a type checker.
# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportReturnType=false
from __future__ import annotations

from dataclasses import dataclass

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
from mmattn.kernels.launch import SIZES, Launch, access_unit, mask_arguments, tensor_arguments
from mmattn.kernels.short_keys_backward import Backward, sum_launch
from mmattn.kernels.short_keys_configs import head_tiles
from mmattn.kernels.tiles import ceil_div, one_tile, tiles_of

KEYS, VALUES, QUERIES = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@dataclass(frozen=True)
class SplitConfig:
    """Attributes: queries a block, programs that a head's queries are shared among for the gradients of its keys (and
    as many for its values), warps, pipeline depth, whether heads and keys are cut into two blocks instead of padded."""

    block_m: int = 64
    splits: int = 1
    num_warps: int = 4
    num_stages: int = 1
    is_head_cut: bool = True
    are_keys_cut: bool = False
    is_turned: bool = True
    block_q: int = 64


@triton.jit
def _walk(
    query_ptr, grad_output_ptr, lse_ptr, attn_mask_ptr,
    query_strides, grad_output_strides, attn_mask_strides,
    key, value, is_key, scale, batch, head, num_heads, num_queries, first_block,
    HEAD_DIM: tl.constexpr, DIM_TILES: tl.constexpr, KEY_TILES: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCKS: tl.constexpr, NUM_STAGES: tl.constexpr, HAS_ATTN_MASK: tl.constexpr,
    WHAT: tl.constexpr, IS_TURNED: tl.constexpr,
):  # fmt: skip
    """Sums [N, D] over BLOCKS blocks of queries: of the keys' gradients / scale, or of the values'."""
    sums = ()
    for n in tl.static_range(len(KEY_TILES)):
        sums = sums + (zero_blocks(KEY_TILES[n][1], DIM_TILES),)
    rows = tl.arange(0, BLOCK_M)
    for block in tl.range(BLOCKS, num_stages=NUM_STAGES):
        start = ((first_block + block) * BLOCK_M).to(tl.int64)
        is_row = rows < num_queries - start
        query, grad_output, weights, grad_weights, delta = _weights(
            query_ptr, grad_output_ptr, lse_ptr, attn_mask_ptr,
            query_strides, grad_output_strides, attn_mask_strides,
            key, value, is_key, scale, batch, head, num_heads, num_queries, start, rows, is_row,
            HEAD_DIM, DIM_TILES, KEY_TILES, UNIT, BLOCK_M, HAS_ATTN_MASK, WHAT, IS_TURNED,
        )  # fmt: skip
        new_sums = ()
        for n in tl.static_range(len(KEY_TILES)):
            if WHAT == KEYS:
                if IS_TURNED:
                    left = (weights[n] * (grad_weights[n] - delta[None, :])).to(query[0].dtype)
                else:
                    left = (weights[n] * (grad_weights[n] - delta[:, None])).to(query[0].dtype).T
                new_sums = new_sums + (add_products(sums[n], left, query, DIM_TILES),)
            else:
                left = weights[n].to(query[0].dtype)
                if not IS_TURNED:
                    left = left.T
                new_sums = new_sums + (add_products(sums[n], left, grad_output, DIM_TILES),)
        sums = new_sums
    return sums


@triton.jit
def _weights(
    query_ptr, grad_output_ptr, lse_ptr, attn_mask_ptr,
    query_strides, grad_output_strides, attn_mask_strides,
    key, value, is_key, scale, batch, head, num_heads, num_queries, start, rows, is_row,
    HEAD_DIM: tl.constexpr, DIM_TILES: tl.constexpr, KEY_TILES: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr, HAS_ATTN_MASK: tl.constexpr, WHAT: tl.constexpr, IS_TURNED: tl.constexpr,
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
        if IS_TURNED:
            scores = row_products(key[n], query, DIM_TILES) * (scale * LOG2_E)
            allowed = is_key[n][:, None]
            if HAS_ATTN_MASK:
                pointers = (
                    attn_mask_rows + (rows * attn_mask_strides[2])[None, :] + (keys * attn_mask_strides[3])[:, None]
                )
                allowed = allowed & (tl.load(pointers, mask=is_row[None, :] & allowed, other=0) != 0)
            part = tl.exp2(tl.where(allowed, scores, float("-inf")) - lse[None, :])
        else:
            scores = masked_scores(
                query, key[n], scale * LOG2_E, rows, is_row, keys, is_key[n], attn_mask_rows, attn_mask_strides,
                HAS_ATTN_MASK, DIM_TILES,
            )  # fmt: skip
            part = tl.exp2(scores - lse[:, None])
        weights = weights + (part,)
        if WHAT != VALUES:
            if IS_TURNED:
                products = row_products(value[n], grad_output, DIM_TILES)
                delta += tl.sum(part * products, axis=0)
            else:
                products = row_products(grad_output, value[n], DIM_TILES)
                delta += tl.sum(part * products, axis=1)
            grad_weights = grad_weights + (products,)
    return query, grad_output, weights, grad_weights, delta


@triton.jit
def _store_sums(
    base, sums, factor, strides, num_keys,
    KEY_TILES: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_TILES: tl.constexpr,
):  # fmt: skip
    for n in tl.static_range(len(KEY_TILES)):
        keys = KEY_TILES[n][0] + tl.arange(0, KEY_TILES[n][1])
        store_scaled(
            base, sums[n], keys, keys < num_keys, factor, strides, KEY_TILES[n][1], HEAD_DIM, DIM_TILES, 1
        )  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def split_bwd_kernel(
    query_ptr, key_ptr, value_ptr, grad_output_ptr, lse_ptr, grad_query_ptr, grad_key_ptr, grad_value_ptr,
    key_mask_ptr, attn_mask_ptr,
    query_strides, key_strides, value_strides, grad_output_strides,
    grad_query_strides, grad_key_strides, grad_value_strides, key_mask_strides, attn_mask_strides,
    scale, num_heads, group, num_queries, num_keys, num_batches, num_splits,
    HEAD_DIM: tl.constexpr, DIM_TILES: tl.constexpr, KEY_TILES: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCKS: tl.constexpr, NUM_STAGES: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr, HAS_ATTN_MASK: tl.constexpr, IS_TURNED: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """One gradient of one head: first the programs of all keys' gradients, which take longest, then the values', then
    the queries'. With more splits than one gradients of keys and values lie in partials [S, 2, B, H, Lk, D]."""
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
            key, value, is_key, scale, batch, head, num_heads, num_queries, part * BLOCKS,
            HEAD_DIM, DIM_TILES, KEY_TILES, UNIT, BLOCK_M, BLOCKS, NUM_STAGES, HAS_ATTN_MASK, KEYS, IS_TURNED,
        )  # fmt: skip
        base = head_of(grad_key_ptr, grad_key_strides, part * 2 * num_batches + batch, head, 1)
        _store_sums(base, sums, scale, grad_key_strides, num_keys, KEY_TILES, HEAD_DIM, DIM_TILES)
    elif part < 2 * num_splits:
        sums = _walk(
            query_ptr, grad_output_ptr, lse_ptr, attn_mask_ptr,
            query_strides, grad_output_strides, attn_mask_strides,
            key, value, is_key, scale, batch, head, num_heads, num_queries, (part - num_splits) * BLOCKS,
            HEAD_DIM, DIM_TILES, KEY_TILES, UNIT, BLOCK_M, BLOCKS, NUM_STAGES, HAS_ATTN_MASK, VALUES, IS_TURNED,
        )  # fmt: skip
        row = (part - num_splits) * 2 * num_batches + batch
        base = head_of(grad_value_ptr, grad_value_strides, row, head, 1)
        _store_sums(base, sums, 1.0, grad_value_strides, num_keys, KEY_TILES, HEAD_DIM, DIM_TILES)
    else:
        start = ((part - 2 * num_splits) * BLOCK_Q).to(tl.int64)
        rows = tl.arange(0, BLOCK_Q)
        is_row = rows < num_queries - start
        _, _, weights, grad_weights, delta = _weights(
            query_ptr, grad_output_ptr, lse_ptr, attn_mask_ptr,
            query_strides, grad_output_strides, attn_mask_strides,
            key, value, is_key, scale, batch, head, num_heads, num_queries, start, rows, is_row,
            HEAD_DIM, DIM_TILES, KEY_TILES, UNIT, BLOCK_Q, HAS_ATTN_MASK, QUERIES, False,
        )  # fmt: skip
        grad_query = zero_blocks(BLOCK_Q, DIM_TILES)
        for n in tl.static_range(len(KEY_TILES)):
            grad_scores = weights[n] * (grad_weights[n] - delta[:, None])
            grad_query = add_products(grad_query, grad_scores, key[n], DIM_TILES)
        store_scaled(
            rows_of(grad_query_ptr, grad_query_strides, batch, head, start, UNIT), grad_query, rows, is_row, scale,
            grad_query_strides, BLOCK_Q, HEAD_DIM, DIM_TILES, UNIT,
        )  # fmt: skip


def split_backward_launches(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lse: Tensor,
    key_mask: Tensor | None,
    attn_mask: Tensor | None,
    scale: float,
    config: SplitConfig,
) -> Backward:
    """The launches that compute the gradients of query, key and value: one where a program has all queries of a head
    and heads share no keys, else two. Arguments as in `short_keys_backward.backward_launches`; at most 128 keys."""
    batch, heads, num_queries, head_dim = query.shape
    num_keys, group = key.shape[2], heads // key.shape[1]
    gradients = [torch.empty_like(tensor) for tensor in (query, key, value)]
    blocks = ceil_div(num_queries, config.block_m)
    each = ceil_div(blocks, min(blocks, config.splits))
    splits = ceil_div(blocks, each)
    is_whole = splits == 1 and group == 1
    if is_whole:
        sums, sum_launches = gradients[1:], ()
    else:
        partials = query.new_empty((splits, 2, batch, heads, num_keys, head_dim), dtype=torch.float32)
        sums, sum_launches = [partials[0, 0], partials[0, 1]], (sum_launch(partials, *gradients[1:]),)
    unit = access_unit(query, key, value, grad_output, gradients[0])
    arguments = dict(
        **tensor_arguments(unit, query=query, key=key, value=value, grad_output=grad_output, grad_query=gradients[0]),
        **tensor_arguments(1, grad_key=sums[0], grad_value=sums[1]),
        **mask_arguments(query, key, key_mask, attn_mask),
        lse_ptr=lse,
        scale=scale,
        num_heads=heads,
        group=group,
        num_queries=num_queries,
        num_keys=num_keys,
        num_batches=batch,
        num_splits=splits,
        HEAD_DIM=head_dim,
        DIM_TILES=head_tiles(query.dtype, head_dim, config.is_head_cut),
        KEY_TILES=tiles_of(num_keys) if config.are_keys_cut else one_tile(num_keys),
        UNIT=unit,
        BLOCK_M=config.block_m,
        BLOCKS=each,
        NUM_STAGES=config.num_stages,
        IS_TURNED=config.is_turned,
        BLOCK_Q=config.block_q,
    )
    launch = Launch(
        split_bwd_kernel,
        heads * batch * (2 * splits + ceil_div(num_queries, config.block_q)),
        arguments,
        config.num_warps,
        config.num_stages,
    )
    return Backward((launch, *sum_launches), *gradients)
