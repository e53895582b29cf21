"""Attention of packed sequences, backward: one kernel by blocks of queries, one by blocks of keys.

    P = exp(scale * Q @ K^T - lse)     dP = dO @ V^T     delta = sum(O * dO)     dS = P * (dP - delta)
    dQ = scale * dS @ K                dK = scale * dS^T @ Q                     dV = P^T @ dO

(arXiv 2307.08691, section 3.1.2.) The first writes dQ and delta; the second walks over the queries of its keys'
sequences, for all query heads that share them, one after the other. Nothing is added atomically: the same inputs give
the same bits. As in the forward a walk that comes to a NaN is done again, carefully.

Shapes: N rows of all queries, M of all keys, H query heads, G key/value heads, D head_dim, S sequences.
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
    load_lse,
    load_rows_of,
    row_products,
    row_sums,
    rows_of,
    store_rows,
    store_scaled,
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
from mmattn.kernels.packed_rows_forward import num_blocks
from mmattn.kernels.short_keys_configs import head_tiles


@triton.jit
def _walk_over_keys(
    query, grad_output, lse, delta, first, end, key_ptr, value_ptr, key_strides, value_strides, kv_head, scale,
    HEAD_DIM: tl.constexpr, DIM_TILES: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, NUM_STAGES: tl.constexpr, IS_CAREFUL: tl.constexpr,
):  # fmt: skip
    """dQ / scale of queries [M]."""
    grad_query = zero_blocks(BLOCK_M, DIM_TILES)
    keys = tl.arange(0, BLOCK_N)
    earliest, last = span(first, end)
    for block in tl.range(tl.cdiv(last - earliest, BLOCK_N), num_stages=NUM_STAGES):
        start = earliest + block * BLOCK_N
        is_key = keys < last - start
        far = start.to(tl.int64)
        key = load_rows_of(key_ptr, key_strides, 0, kv_head, far, keys, is_key, HEAD_DIM, DIM_TILES, UNIT)
        value = load_rows_of(value_ptr, value_strides, 0, kv_head, far, keys, is_key, HEAD_DIM, DIM_TILES, UNIT)
        weights = tl.exp2(row_products(query, key, DIM_TILES) * (scale * LOG2_E) - lse[:, None])
        grad_scores = weights * (row_products(grad_output, value, DIM_TILES) - delta[:, None])
        grad_scores = tl.where(are_partners(start + keys, first, end), grad_scores, 0.0)
        if IS_CAREFUL:
            # A key that is not finite has spoilt the scores already.
            key, _ = sifted(key, BLOCK_N, DIM_TILES)
        grad_query = add_products(grad_query, grad_scores, key, DIM_TILES)
    return grad_query


@triton.jit(do_not_specialize=PACKED_SIZES)
def packed_queries_bwd_kernel(
    query_ptr, key_ptr, value_ptr, output_ptr, grad_output_ptr, lse_ptr, delta_ptr, grad_query_ptr,
    query_starts_ptr, key_starts_ptr, query_numbers_ptr,
    query_strides, key_strides, value_strides, output_strides, grad_output_strides, grad_query_strides,
    scale, num_heads, group, num_queries, num_sequences,
    HEAD_DIM: tl.constexpr, DIM_TILES: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, NUM_STAGES: tl.constexpr, IS_CAUSAL: tl.constexpr,
):  # fmt: skip
    """dQ and delta [H, N] of one head and BLOCK_M queries."""
    head, start, rows, is_row, first, end = place_of_rows(
        num_heads, num_queries, query_numbers_ptr, query_starts_ptr, key_starts_ptr, num_sequences,
        BLOCK_M, IS_CAUSAL, False,
    )  # fmt: skip
    output = load_rows_of(output_ptr, output_strides, 0, head, start, rows, is_row, HEAD_DIM, DIM_TILES, UNIT)
    grad_output = load_rows_of(
        grad_output_ptr, grad_output_strides, 0, head, start, rows, is_row, HEAD_DIM, DIM_TILES, UNIT
    )  # fmt: skip
    delta = row_sums(output, grad_output, BLOCK_M, DIM_TILES)
    row_offset = head * num_queries + start
    tl.store(delta_ptr + row_offset + rows, delta, mask=is_row)
    lse = load_lse(lse_ptr + row_offset, rows, is_row)
    query = load_rows_of(query_ptr, query_strides, 0, head, start, rows, is_row, HEAD_DIM, DIM_TILES, UNIT)
    grad_query = _walk_over_keys(
        query, grad_output, lse, delta, first, end, key_ptr, value_ptr, key_strides, value_strides, head // group,
        scale, HEAD_DIM, DIM_TILES, UNIT, BLOCK_M, BLOCK_N, NUM_STAGES, False,
    )  # fmt: skip
    if has_nan(grad_query, DIM_TILES):
        grad_query = _walk_over_keys(
            query, grad_output, lse, delta, first, end, key_ptr, value_ptr, key_strides, value_strides, head // group,
            scale, HEAD_DIM, DIM_TILES, UNIT, BLOCK_M, BLOCK_N, 1, True,
        )  # fmt: skip
    grad_query_rows = rows_of(grad_query_ptr, grad_query_strides, 0, head, start, UNIT)
    store_scaled(
        grad_query_rows, grad_query, rows, is_row, scale, grad_query_strides, BLOCK_M, HEAD_DIM, DIM_TILES, UNIT
    )


@triton.jit
def _walk_over_queries(
    key, value, first, end, query_ptr, grad_output_ptr, lse_ptr, delta_ptr, query_strides, grad_output_strides,
    kv_head, group, num_queries, scale,
    HEAD_DIM: tl.constexpr, DIM_TILES: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, NUM_STAGES: tl.constexpr, IS_CAREFUL: tl.constexpr,
):  # fmt: skip
    """(dK / scale, dV) of keys [M]; products are [M, N], keys by queries."""
    grad_key = zero_blocks(BLOCK_M, DIM_TILES)
    grad_value = zero_blocks(BLOCK_M, DIM_TILES)
    rows = tl.arange(0, BLOCK_N)
    earliest, last = span(first, end)
    for member in tl.range(group):
        head = kv_head * group + member
        for block in tl.range(tl.cdiv(last - earliest, BLOCK_N), num_stages=NUM_STAGES):
            start = earliest + block * BLOCK_N
            is_row = rows < last - start
            far = start.to(tl.int64)
            query = load_rows_of(query_ptr, query_strides, 0, head, far, rows, is_row, HEAD_DIM, DIM_TILES, UNIT)
            grad_output = load_rows_of(
                grad_output_ptr, grad_output_strides, 0, head, far, rows, is_row, HEAD_DIM, DIM_TILES, UNIT
            )  # fmt: skip
            row_offset = head * num_queries + far
            lse = load_lse(lse_ptr + row_offset, rows, is_row)
            delta = tl.load(delta_ptr + row_offset + rows, mask=is_row, other=0.0)
            scores = row_products(key, query, DIM_TILES) * (scale * LOG2_E)
            grad_weights = row_products(value, grad_output, DIM_TILES)
            if IS_CAREFUL:
                query, _ = sifted(query, BLOCK_N, DIM_TILES)
                grad_output, spoilt = sifted(grad_output, BLOCK_N, DIM_TILES)
                scores += spoilt[None, :]
            allowed = are_partners(start + rows, first, end)
            weights = tl.where(allowed, tl.exp2(scores - lse[None, :]), 0.0)
            grad_scores = tl.where(allowed, weights * (grad_weights - delta[None, :]), 0.0)
            grad_value = add_products(grad_value, weights, grad_output, DIM_TILES)
            grad_key = add_products(grad_key, grad_scores, query, DIM_TILES)
    return grad_key, grad_value


@triton.jit(do_not_specialize=PACKED_SIZES)
def packed_keys_bwd_kernel(
    query_ptr, key_ptr, value_ptr, grad_output_ptr, lse_ptr, delta_ptr, grad_key_ptr, grad_value_ptr,
    query_starts_ptr, key_starts_ptr, key_numbers_ptr,
    query_strides, key_strides, value_strides, grad_output_strides, grad_key_strides, grad_value_strides,
    scale, num_heads, group, num_queries, num_keys, num_sequences,
    HEAD_DIM: tl.constexpr, DIM_TILES: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, NUM_STAGES: tl.constexpr, IS_CAUSAL: tl.constexpr,
):  # fmt: skip
    """dK and dV of one key/value head (`num_heads` of them) and BLOCK_M keys; zeros for keys of no sequence."""
    kv_head, start, keys, is_key, first, end = place_of_rows(
        num_heads, num_keys, key_numbers_ptr, key_starts_ptr, query_starts_ptr, num_sequences, BLOCK_M, IS_CAUSAL, True
    )  # fmt: skip
    key = load_rows_of(key_ptr, key_strides, 0, kv_head, start, keys, is_key, HEAD_DIM, DIM_TILES, UNIT)
    value = load_rows_of(value_ptr, value_strides, 0, kv_head, start, keys, is_key, HEAD_DIM, DIM_TILES, UNIT)
    grad_key, grad_value = _walk_over_queries(
        key, value, first, end, query_ptr, grad_output_ptr, lse_ptr, delta_ptr, query_strides, grad_output_strides,
        kv_head, group, num_queries, scale, HEAD_DIM, DIM_TILES, UNIT, BLOCK_M, BLOCK_N, NUM_STAGES, False,
    )  # fmt: skip
    if has_nan(grad_key, DIM_TILES) or has_nan(grad_value, DIM_TILES):
        grad_key, grad_value = _walk_over_queries(
            key, value, first, end, query_ptr, grad_output_ptr, lse_ptr, delta_ptr, query_strides, grad_output_strides,
            kv_head, group, num_queries, scale, HEAD_DIM, DIM_TILES, UNIT, BLOCK_M, BLOCK_N, 1, True,
        )  # fmt: skip
    grad_key_rows = rows_of(grad_key_ptr, grad_key_strides, 0, kv_head, start, UNIT)
    store_scaled(grad_key_rows, grad_key, keys, is_key, scale, grad_key_strides, BLOCK_M, HEAD_DIM, DIM_TILES, UNIT)
    grad_value_rows = rows_of(grad_value_ptr, grad_value_strides, 0, kv_head, start, UNIT)
    store_rows(grad_value_rows, grad_value, keys, is_key, grad_value_strides, HEAD_DIM, DIM_TILES, UNIT)


def backward_launches(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    query_starts: Tensor,
    key_starts: Tensor,
    query_numbers: Tensor,
    key_numbers: Tensor,
    is_causal: bool,
    scale: float,
    delta: Tensor,
    gradients: tuple[Tensor, Tensor, Tensor],
    config: RowsConfig | None = None,
) -> tuple[Launch, ...]:
    """The launches that fill `gradients` and `delta`, one after the other; nothing is empty.

    Args:
        grad_output: [N, H, D], any strides.
        query, key, value, output, lse, query_starts, key_starts, query_numbers, is_causal, scale: the forward's.
        key_numbers: int32 [M], the sequence of each key; S and more for those of none.
        delta: float32 [H, N], contiguous, to be written.
        gradients: of query, key and value, to be written.
        config: block sizes of both; `rows_config`'s by default.
    """
    num_queries, heads, head_dim = query.shape
    num_keys, kv_heads, _ = key.shape
    card = card_of(query.device)
    queries_config, keys_config = (
        config or rows_config(card, query.dtype, head_dim, are_keys) for are_keys in (False, True)
    )
    grad_query, grad_key, grad_value = gradients
    unit = access_unit(query, key, value, output, grad_output, *gradients)
    shared: dict[str, Any] = dict(
        **tensor_arguments(unit, query=query, key=key, value=value, grad_output=grad_output),
        lse_ptr=lse,
        delta_ptr=delta,
        query_starts_ptr=query_starts,
        key_starts_ptr=key_starts,
        scale=scale,
        group=heads // kv_heads,
        num_queries=num_queries,
        num_sequences=query_starts.shape[0] - 1,
        HEAD_DIM=head_dim,
        DIM_TILES=head_tiles(query.dtype, head_dim, is_cut=True),
        UNIT=unit,
        IS_CAUSAL=is_causal,
    )
    of_queries = shared | dict(
        **tensor_arguments(unit, output=output, grad_query=grad_query),
        query_numbers_ptr=query_numbers,
        num_heads=heads,
    )
    of_keys = shared | dict(
        **tensor_arguments(unit, grad_key=grad_key, grad_value=grad_value),
        key_numbers_ptr=key_numbers,
        num_heads=kv_heads,
        num_keys=num_keys,
    )
    return (
        _launch(packed_queries_bwd_kernel, num_queries, of_queries, queries_config),
        _launch(packed_keys_bwd_kernel, num_keys, of_keys, keys_config),
    )


def _launch(kernel: Any, num_rows: int, arguments: dict[str, Any], config: RowsConfig) -> Launch:
    programs = num_blocks(num_rows, config.block_m) * arguments["num_heads"]
    blocks = {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "NUM_STAGES": config.num_stages}
    return Launch(kernel, programs, arguments | blocks, config.num_warps, config.num_stages)
