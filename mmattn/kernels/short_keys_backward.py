"""Attention over short keys, backward.

Long-key kernels give each block of keys to a program that walks over all queries. With 77 keys that is one program a
head, and most of a large card idles. Here the queries are split: a program holds keys and values of a head, walks over
its share of the queries, writes their gradients, and float32 sums for keys and values; a second kernel adds the
programs' sums in a fixed order. Nothing is added atomically: the same inputs give the same bits.

    P = exp(scale * Q @ K^T - lse)     dP = dO @ V^T     delta = sum(P * dP)     dS = P * (dP - delta)
    dQ = scale * dS @ K                dK = scale * dS^T @ Q                     dV = P^T @ dO

(arXiv 2307.08691, section 3.1.2.) With all keys of a row at hand delta is their sum, and the output is not read again.
Where gradients of all keys and values do not fit into a program (`BackwardConfig.is_fused`), a kernel of its own writes
dQ and delta, and programs of the first one have a block of keys each. Where there are few queries, programs compute one
gradient each (`short_keys_backward_split`).

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
    load_keys,
    load_lse,
    load_rows_of,
    masked_scores,
    place,
    row_products,
    rows_of,
    store_rows,
    store_scaled,
    zero_blocks,
)
from mmattn.kernels.launch import SIZES, Launch, access_unit, card_of, mask_arguments, tensor_arguments
from mmattn.kernels.short_keys_backward_queries import queries_launch
from mmattn.kernels.short_keys_backward_split import split_launches
from mmattn.kernels.short_keys_backward_sums import sum_launch
from mmattn.kernels.short_keys_configs import BackwardConfig, SplitConfig, backward_config, head_tiles
from mmattn.kernels.tiles import Tiles, ceil_div, one_tile, tiles_of


@triton.jit
def _weights(
    query, grad_output, lse, delta, key, value, is_key, rows, is_row, first, attn_mask_rows, attn_mask_strides, scale,
    DIM_TILES: tl.constexpr, KEY_TILES: tl.constexpr, IS_FUSED: tl.constexpr, HAS_ATTN_MASK: tl.constexpr,
):  # fmt: skip
    """(P, dP, delta): the first two with an item [M, N] for each block of keys."""
    weights = ()
    grad_weights = ()
    for n in tl.static_range(len(KEY_TILES)):
        keys = first + KEY_TILES[n][0] + tl.arange(0, KEY_TILES[n][1])
        scores = masked_scores(
            query, key[n], scale * LOG2_E, rows, is_row, keys, is_key[n], attn_mask_rows, attn_mask_strides,
            HAS_ATTN_MASK, DIM_TILES,
        )  # fmt: skip
        part = tl.exp2(scores - lse[:, None])
        products = row_products(grad_output, value[n], DIM_TILES)
        if IS_FUSED:
            delta += tl.sum(part * products, axis=1)
        weights = weights + (part,)
        grad_weights = grad_weights + (products,)
    return weights, grad_weights, delta


@triton.jit
def _add_gradients(
    grad_key, grad_value, weights, grad_weights, delta, query, grad_output, key,
    BLOCK_M: tl.constexpr, DIM_TILES: tl.constexpr, KEY_TILES: tl.constexpr, IS_FUSED: tl.constexpr,
):  # fmt: skip
    """(dK, dV) with what a block of queries adds, and dQ / scale of that block."""
    new_grad_key = ()
    new_grad_value = ()
    grad_query = zero_blocks(BLOCK_M, DIM_TILES)
    for n in tl.static_range(len(KEY_TILES)):
        grad_scores = (weights[n] * (grad_weights[n] - delta[:, None])).to(query[0].dtype)
        if IS_FUSED:
            grad_query = add_products(grad_query, grad_scores, key[n], DIM_TILES)
        new_grad_key = new_grad_key + (add_products(grad_key[n], grad_scores.T, query, DIM_TILES),)
        low_weights = weights[n].to(query[0].dtype)
        new_grad_value = new_grad_value + (add_products(grad_value[n], low_weights.T, grad_output, DIM_TILES),)
    return new_grad_key, new_grad_value, grad_query


@triton.jit(do_not_specialize=SIZES)
def keys_bwd_kernel(
    query_ptr, key_ptr, value_ptr, grad_output_ptr, lse_ptr, delta_ptr, grad_query_ptr, partials_ptr,
    key_mask_ptr, attn_mask_ptr,
    query_strides, key_strides, value_strides, grad_output_strides, grad_query_strides,
    key_mask_strides, attn_mask_strides,
    scale, num_batches, num_heads, group, num_queries, num_keys, num_splits,
    HEAD_DIM: tl.constexpr, DIM_TILES: tl.constexpr, KEY_TILES: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr, ROW_BLOCKS: tl.constexpr, BLOCK_N: tl.constexpr, IS_FUSED: tl.constexpr,
    NUM_STAGES: tl.constexpr, HAS_KEY_MASK: tl.constexpr, HAS_ATTN_MASK: tl.constexpr,
):  # fmt: skip
    """Sums for the keys of one block over the queries of one split: partials [S, 2, B, H, Lk, D], keys then values.

    Fused, the block is all keys, and gradients of the queries are written too.
    """
    head, split, rest = place(num_heads, num_splits)
    batch = (rest % num_batches).to(tl.int64)
    first = (rest // num_batches) * BLOCK_N
    key, value, is_key = load_keys(
        key_ptr, value_ptr, key_mask_ptr, key_strides, value_strides, key_mask_strides, batch, head // group, first,
        num_keys, KEY_TILES, HEAD_DIM, DIM_TILES, UNIT, HAS_KEY_MASK,
    )  # fmt: skip
    grad_key = ()
    grad_value = ()
    for n in tl.static_range(len(KEY_TILES)):
        grad_key = grad_key + (zero_blocks(KEY_TILES[n][1], DIM_TILES),)
        grad_value = grad_value + (zero_blocks(KEY_TILES[n][1], DIM_TILES),)

    rows = tl.arange(0, BLOCK_M)
    for block in tl.range(ROW_BLOCKS, num_stages=NUM_STAGES):
        start = ((split * ROW_BLOCKS + block) * BLOCK_M).to(tl.int64)
        is_row = rows < num_queries - start
        query = load_rows_of(query_ptr, query_strides, batch, head, start, rows, is_row, HEAD_DIM, DIM_TILES, UNIT)
        grad_output = load_rows_of(
            grad_output_ptr, grad_output_strides, batch, head, start, rows, is_row, HEAD_DIM, DIM_TILES, UNIT
        )  # fmt: skip
        row_offset = (batch * num_heads + head) * num_queries + start
        lse = load_lse(lse_ptr + row_offset, rows, is_row)
        if IS_FUSED:
            delta = tl.full([BLOCK_M], 0.0, dtype=tl.float32)
        else:
            delta = tl.load(delta_ptr + row_offset + rows, mask=is_row, other=0.0)
        attn_mask_rows = rows_of(attn_mask_ptr, attn_mask_strides, batch, head, start, 1)
        weights, grad_weights, delta = _weights(
            query, grad_output, lse, delta, key, value, is_key, rows, is_row, first, attn_mask_rows,
            attn_mask_strides, scale, DIM_TILES, KEY_TILES, IS_FUSED, HAS_ATTN_MASK,
        )  # fmt: skip
        grad_key, grad_value, grad_query = _add_gradients(
            grad_key, grad_value, weights, grad_weights, delta, query, grad_output, key,
            BLOCK_M, DIM_TILES, KEY_TILES, IS_FUSED,
        )  # fmt: skip
        if IS_FUSED:
            grad_query_rows = rows_of(grad_query_ptr, grad_query_strides, batch, head, start, UNIT)
            store_scaled(
                grad_query_rows, grad_query, rows, is_row, scale, grad_query_strides,
                BLOCK_M, HEAD_DIM, DIM_TILES, UNIT,
            )  # fmt: skip

    matrix = (split * 2 * num_batches + batch) * num_heads + head
    key_sums = partials_ptr + matrix * num_keys * HEAD_DIM
    value_sums = partials_ptr + (matrix + num_batches * num_heads) * num_keys * HEAD_DIM
    strides = (0, 0, HEAD_DIM, 1)
    for n in tl.static_range(len(KEY_TILES)):
        keys = first + KEY_TILES[n][0] + tl.arange(0, KEY_TILES[n][1])
        is_key = keys < num_keys
        store_scaled(key_sums, grad_key[n], keys, is_key, scale, strides, KEY_TILES[n][1], HEAD_DIM, DIM_TILES, 1)
        store_rows(value_sums, grad_value[n], keys, is_key, strides, HEAD_DIM, DIM_TILES, 1)


@dataclass(frozen=True)
class Backward:
    """Launches in their order, and what they fill."""

    launches: tuple[Launch, ...]
    grad_query: Tensor
    grad_key: Tensor
    grad_value: Tensor


def backward_launches(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    key_mask: Tensor | None,
    attn_mask: Tensor | None,
    scale: float,
    config: BackwardConfig | SplitConfig | None = None,
    gradients: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Backward:
    """The launches that compute what `short_key_attention_backward` returns, of the same arguments; nothing is empty.

    Args:
        grad_output: [B, H, Lq, D], any strides.
        query, key, value, output, lse, key_mask, attn_mask, scale: the forward's.
        config: block sizes; the table's by default.
        gradients: of query, key and value, to be written; made by default.
    """
    batch, heads, num_queries, head_dim = query.shape
    num_keys = key.shape[2]
    sizes = (head_dim, num_keys, num_queries, batch * heads)
    config = config or backward_config(card_of(query.device), query.dtype, *sizes)
    gradients = gradients or (torch.empty_like(query), torch.empty_like(key), torch.empty_like(value))
    if isinstance(config, SplitConfig):
        inputs = (grad_output, query, key, value, lse, key_mask, attn_mask)
        return Backward(split_launches(*inputs, scale, config, gradients), *gradients)
    grad_query, grad_key, grad_value = gradients
    is_fused = config.is_fused
    key_blocks = 1 if is_fused else ceil_div(num_keys, config.block_n)
    row_blocks_each, num_splits = _splits(query, key_blocks, config)
    partials = query.new_empty((num_splits, 2, batch, heads, num_keys, head_dim), dtype=torch.float32)
    unit = access_unit(query, key, value, output, grad_output, grad_query)
    shared = dict(
        **tensor_arguments(unit, query=query, key=key, value=value, grad_output=grad_output, grad_query=grad_query),
        **mask_arguments(query, key, key_mask, attn_mask),
        lse_ptr=lse,
        # Fused, delta is never stored.
        delta_ptr=lse if is_fused else torch.empty_like(lse),
        scale=scale,
        num_heads=heads,
        group=heads // key.shape[1],
        num_queries=num_queries,
        num_keys=num_keys,
        HEAD_DIM=head_dim,
        DIM_TILES=head_tiles(query.dtype, head_dim, config.is_head_cut),
        UNIT=unit,
        BLOCK_M=config.block_m,
        NUM_STAGES=config.num_stages,
    )
    launches = []
    if not is_fused:
        launches.append(queries_launch(shared, output, unit, config))
    arguments = shared | {
        "partials_ptr": partials,
        "num_batches": batch,
        "num_splits": num_splits,
        "KEY_TILES": _key_tiles(num_keys, is_fused, config),
        "ROW_BLOCKS": row_blocks_each,
        "BLOCK_N": config.block_n,
        "IS_FUSED": is_fused,
    }
    programs = heads * num_splits * batch * key_blocks
    launches.append(Launch(keys_bwd_kernel, programs, arguments, config.num_warps, config.num_stages))
    launches.append(sum_launch(partials, grad_key, grad_value))
    return Backward(tuple(launches), grad_query, grad_key, grad_value)


def _key_tiles(num_keys: int, is_fused: bool, config: BackwardConfig) -> Tiles:
    if not is_fused:
        return ((0, config.block_n),)
    return tiles_of(num_keys) if config.are_keys_cut else one_tile(num_keys)


def _splits(query: Tensor, key_blocks: int, config: BackwardConfig) -> tuple[int, int]:
    """(row blocks a program, splits): at least as many programs as the device wants, if there are so many blocks.

    Row blocks are a power of four, a constant of the compiled kernel: few kernels serve all batches and lengths.
    """
    batch, heads, num_queries, _ = query.shape
    blocks = ceil_div(num_queries, config.block_m)
    programs = card_of(query.device).processors * config.programs_per_processor
    splits = max(1, min(blocks, int(programs // (batch * heads * key_blocks))))
    each = 1
    while each * 4 <= ceil_div(blocks, splits):
        each *= 4
    return each, ceil_div(blocks, each)
