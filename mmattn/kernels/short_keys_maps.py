"""Attention over short keys that also gives the weights of chosen keys: attention maps from the same pass.

When a program is done with a block of queries it still holds them, and each row's largest score and sum: the scores of
the chosen keys are computed once more and written as weights. So the attention itself is the forward's, bit for bit,
in the forward's configuration; what is added is a small product and the maps that are written. Maps lie as
[R, H', T, Lq] in memory: the queries of one key are neighbours, and so are the threads that hold them.

The mean over heads needs all heads of a query, which are different programs' work: each head's maps are written, and
a second pass adds them up in a fixed order. No atomics: the same inputs give the same bits.

Shapes: B batch, R of its rows, H query heads, H' of them, G key/value heads, Lq / Lk lengths, D head_dim, T keys.
"""

# What Triton compiles is not what it looks like to a type checker.
# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportReturnType=false
from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmattn.errors import UsageError
from mmattn.kernels.blocks import begin, head_of, load_keys, load_rows, masked_scores, place, rows_of, usable_keys
from mmattn.kernels.launch import SIZES, Launch
from mmattn.kernels.short_keys import short_key_attention_backward
from mmattn.kernels.short_keys_forward import (
    attend_resident,
    attend_streamed,
    forward_launch,
    resident_fwd_kernel,
    streamed_fwd_kernel,
)
from mmattn.kernels.tiles import padded, power_of_two, tiles_up_to

_KEPT_BLOCK = 32  # kept keys at a time: more take more registers than the attention itself
_MAP_SIZES = (*SIZES, "first_row", "num_rows", "num_kept", "num_kept_heads", "kept_stride")


@triton.jit
def _place_of(head, kept_heads_ptr, num_kept_heads, HEADS_BLOCK: tl.constexpr):
    """Where a head stands among those that are kept, -1 if it does not; all are kept for HEADS_BLOCK = 0."""
    found = head
    if HEADS_BLOCK > 0:
        places = tl.arange(0, HEADS_BLOCK)
        kept = tl.load(kept_heads_ptr + places, mask=places < num_kept_heads, other=-1)
        found = tl.max(tl.where(kept == head, places, -1), axis=0).to(tl.int64)
    return found


@triton.jit
def _write_maps(
    query, row_max, total, start, batch, head, key_ptr, key_mask_ptr, attn_mask_ptr,
    key_strides, key_mask_strides, attn_mask_strides, scale, group, num_queries, num_keys,
    maps_ptr, kept_keys_ptr, kept_heads_ptr, kept_stride, first_row, num_rows, num_kept, num_kept_heads,
    HEAD_DIM: tl.constexpr, DIM_TILES: tl.constexpr, UNIT: tl.constexpr, BLOCK_M: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr, HAS_ATTN_MASK: tl.constexpr,
    KEPT_TILES: tl.constexpr, HEADS_BLOCK: tl.constexpr,
):  # fmt: skip
    """Weights of the kept keys of BLOCK_M queries from `start`, if this row and head are kept."""
    start = start.to(tl.int64)
    row = batch - first_row
    found = _place_of(head, kept_heads_ptr, num_kept_heads, HEADS_BLOCK)
    if (row >= 0) & (row < num_rows) & (found >= 0):
        rows = tl.arange(0, BLOCK_M)
        is_row = rows < num_queries - start
        key_base = head_of(key_ptr, key_strides, batch, head // group, UNIT)
        key_mask_row = head_of(key_mask_ptr, key_mask_strides, batch, head // group, 1)
        attn_mask_rows = rows_of(attn_mask_ptr, attn_mask_strides, batch, head, start, 1)
        map_rows = maps_ptr + (row * num_kept_heads + found) * num_kept * num_queries + start
        inverse = 1.0 / tl.where(total == 0.0, 1.0, total)
        for n in tl.static_range(len(KEPT_TILES)):
            places = KEPT_TILES[n][0] + tl.arange(0, KEPT_TILES[n][1])
            is_kept = places < num_kept
            keys = tl.load(kept_keys_ptr + row * kept_stride + places, mask=is_kept, other=-1)
            # A key that is not there is one beyond the last: not read, and its weight is 0.
            keys = tl.where(keys < 0, num_keys, keys)
            is_key = usable_keys(keys, num_keys, key_mask_row, key_mask_strides[2], HAS_KEY_MASK)
            key = load_rows(key_base, keys, is_key, key_strides, HEAD_DIM, DIM_TILES, UNIT)
            scores = masked_scores(
                query, key, scale, rows, is_row, keys, is_key, attn_mask_rows, attn_mask_strides,
                HAS_ATTN_MASK, DIM_TILES,
            )  # fmt: skip
            weights = tl.exp2(scores - row_max[:, None]) * inverse[:, None]
            pointers = map_rows + (places * num_queries)[None, :] + rows[:, None]
            tl.store(pointers, weights, mask=is_row[:, None] & is_kept[None, :])


@triton.jit(do_not_specialize=_MAP_SIZES)
def resident_maps_kernel(
    query_ptr, key_ptr, value_ptr, output_ptr, lse_ptr, key_mask_ptr, attn_mask_ptr,
    query_strides, key_strides, value_strides, output_strides, key_mask_strides, attn_mask_strides,
    scale, num_heads, group, num_queries, num_keys, num_chunks,
    maps_ptr, kept_keys_ptr, kept_heads_ptr, kept_stride, first_row, num_rows, num_kept, num_kept_heads,
    HEAD_DIM: tl.constexpr, DIM_TILES: tl.constexpr, KEY_TILES: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr, ROW_BLOCKS: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr, HAS_ATTN_MASK: tl.constexpr,
    KEPT_TILES: tl.constexpr, HEADS_BLOCK: tl.constexpr, IS_EARLY: tl.constexpr,
):  # fmt: skip
    """`resident_fwd_kernel` with maps."""
    begin(IS_EARLY)
    head, chunk, batch = place(num_heads, num_chunks)
    batch = batch.to(tl.int64)
    key, value, is_key = load_keys(
        key_ptr, value_ptr, key_mask_ptr, key_strides, value_strides, key_mask_strides, batch, head // group, 0,
        num_keys, KEY_TILES, HEAD_DIM, DIM_TILES, UNIT, HAS_KEY_MASK,
    )  # fmt: skip
    for block in tl.range(ROW_BLOCKS):
        start = (chunk * ROW_BLOCKS + block) * BLOCK_M
        query, row_max, total = attend_resident(
            query_ptr, output_ptr, lse_ptr, attn_mask_ptr, query_strides, output_strides, attn_mask_strides,
            key, value, is_key, scale, num_heads, num_queries, batch, head, start,
            HEAD_DIM, DIM_TILES, KEY_TILES, UNIT, BLOCK_M, HAS_ATTN_MASK,
        )  # fmt: skip
        _write_maps(
            query, row_max, total, start, batch, head, key_ptr, key_mask_ptr, attn_mask_ptr,
            key_strides, key_mask_strides, attn_mask_strides, scale, group, num_queries, num_keys,
            maps_ptr, kept_keys_ptr, kept_heads_ptr, kept_stride, first_row, num_rows, num_kept, num_kept_heads,
            HEAD_DIM, DIM_TILES, UNIT, BLOCK_M, HAS_KEY_MASK, HAS_ATTN_MASK, KEPT_TILES, HEADS_BLOCK,
        )  # fmt: skip


@triton.jit(do_not_specialize=_MAP_SIZES)
def streamed_maps_kernel(
    query_ptr, key_ptr, value_ptr, output_ptr, lse_ptr, key_mask_ptr, attn_mask_ptr,
    query_strides, key_strides, value_strides, output_strides, key_mask_strides, attn_mask_strides,
    scale, num_heads, group, num_queries, num_keys, num_chunks,
    maps_ptr, kept_keys_ptr, kept_heads_ptr, kept_stride, first_row, num_rows, num_kept, num_kept_heads,
    HEAD_DIM: tl.constexpr, DIM_TILES: tl.constexpr, LAST_TILES: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WHOLE_BLOCKS: tl.constexpr, NUM_STAGES: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr, HAS_ATTN_MASK: tl.constexpr,
    KEPT_TILES: tl.constexpr, HEADS_BLOCK: tl.constexpr, IS_EARLY: tl.constexpr,
):  # fmt: skip
    """`streamed_fwd_kernel` with maps."""
    begin(IS_EARLY)
    head, chunk, batch = place(num_heads, num_chunks)
    batch = batch.to(tl.int64)
    start = chunk * BLOCK_M
    query, row_max, total = attend_streamed(
        query_ptr, key_ptr, value_ptr, output_ptr, lse_ptr, key_mask_ptr, attn_mask_ptr,
        query_strides, key_strides, value_strides, output_strides, key_mask_strides, attn_mask_strides,
        scale, num_heads, group, num_queries, num_keys, batch, head, start,
        HEAD_DIM, DIM_TILES, LAST_TILES, UNIT, BLOCK_M, BLOCK_N, WHOLE_BLOCKS, NUM_STAGES, HAS_KEY_MASK, HAS_ATTN_MASK,
    )  # fmt: skip
    _write_maps(
        query, row_max, total, start, batch, head, key_ptr, key_mask_ptr, attn_mask_ptr,
        key_strides, key_mask_strides, attn_mask_strides, scale, group, num_queries, num_keys,
        maps_ptr, kept_keys_ptr, kept_heads_ptr, kept_stride, first_row, num_rows, num_kept, num_kept_heads,
        HEAD_DIM, DIM_TILES, UNIT, BLOCK_M, HAS_KEY_MASK, HAS_ATTN_MASK, KEPT_TILES, HEADS_BLOCK,
    )  # fmt: skip


_WITH_MAPS = {resident_fwd_kernel: resident_maps_kernel, streamed_fwd_kernel: streamed_maps_kernel}


def maps_launch(forward: Launch, maps: Tensor, keys: Tensor, first_row: int, heads: Tensor | None) -> Launch:
    """The launch that does what `forward` does, in its configuration, and fills `maps` too.

    Args:
        forward: of `forward_launch`.
        maps: float32 [R, H', T, Lq], contiguous, to be written.
        keys: integers [R, T], the keys to keep of each row, the last axis contiguous; those that are not there (-1, Lk
            and more) have weights of 0.
        first_row: the row of the batch that the first of R is.
        heads: integers [H'], each once, the heads to keep; None: all.
    """
    num_rows, num_heads, num_kept, _ = maps.shape
    arguments = dict(
        maps_ptr=maps,
        kept_keys_ptr=keys,
        kept_heads_ptr=keys if heads is None else heads,
        kept_stride=keys.stride(0),
        first_row=first_row,
        num_rows=num_rows,
        num_kept=num_kept,
        num_kept_heads=num_heads,
        # As many as the keys are cut into: where all are kept, no more kernels are compiled than without maps.
        KEPT_TILES=tiles_up_to(_KEPT_BLOCK, padded(num_kept)),
        HEADS_BLOCK=0 if heads is None else power_of_two(num_heads),
    )
    return replace(forward, kernel=_WITH_MAPS[forward.kernel], arguments=forward.arguments | arguments)


@torch.library.custom_op("mmattn::short_key_attention_maps", mutates_args=())
def short_key_attention_maps(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    attn_mask: Tensor | None,
    scale: float,
    keys: Tensor,
    first_row: int,
    heads: Sequence[int] | None,
    average: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`short_key_attention`, and the weights of some keys: softmax(scale * query @ key^T)[..., keys].

    Output and log-sum-exp are those of `short_key_attention`, bit for bit, and gradients flow through the output only.

    Args:
        query: [B, H, Lq, D]; this one and those up to `scale` as in `short_key_attention`.
        key: [B, G, Lk, D].
        value: [B, G, Lk, D].
        key_mask: boolean, broadcastable to [B, G, Lk].
        attn_mask: boolean, broadcastable to [B, H, Lq, Lk].
        scale: factor of the scores.
        keys: int32 or int64 [R, T], the keys to keep of R rows of the batch, in any order; -1 stands for none, and has
            weights of 0, as keys beyond the last have.
        first_row: the row of the batch that the first of those R is.
        heads: the heads to keep, each once, in any order; None: all.
        average: over those heads.

    Returns:
        (output [B, H, Lq, D], lse float32 [B, H, Lq], maps float32 [R, H' or 1, Lq, T]). A row of queries that may
        attend to nothing has weights of 0.

    Raises:
        UsageError: rows that are not in the batch, heads that are not there or come twice.
    """
    _check(query, keys, first_row, heads)
    output, lse, maps = _outputs(query, keys, query.shape[1] if heads is None else len(heads))
    if query.numel() == 0 or key.numel() == 0:
        output, lse, maps = output.zero_(), lse.fill_(float("-inf")), maps.zero_()
    else:
        launch = forward_launch(query, key, value, key_mask, attn_mask, scale, output, lse)
        if maps.numel():
            kept = None if heads is None else _on_device(tuple(heads), query.device)
            keys = keys if keys.stride(1) == 1 else keys.contiguous()
            launch = maps_launch(launch, maps, keys, first_row, kept)
        launch.run(query.device)
    return output, lse, _as_returned(maps, average=average)


def _check(query: Tensor, keys: Tensor, first_row: int, heads: Sequence[int] | None) -> None:
    batch, num_heads = query.shape[:2]
    if keys.dim() != 2 or keys.dtype not in (torch.int32, torch.int64) or keys.device != query.device:
        raise UsageError(
            f"short_key_attention_maps: keys are {keys.dtype} {list(keys.shape)} on {keys.device}; give integers [R, T]"
            f" on {query.device}"
        )
    if not 0 <= first_row <= batch - keys.shape[0]:
        raise UsageError(
            f"short_key_attention_maps: {keys.shape[0]} rows from row {first_row} on, but the batch has {batch}"
        )
    wrong = heads is not None and (not heads or len(set(heads)) < len(heads) or not set(heads) <= set(range(num_heads)))
    if wrong:
        raise UsageError(
            f"short_key_attention_maps: heads are {list(heads or ())}; give some of the {num_heads} heads, each once"
        )


@functools.lru_cache(maxsize=64)
def _on_device(heads: tuple[int, ...], device: torch.device) -> Tensor:
    # An ordinary tensor, whatever mode the first call is in.
    with torch.inference_mode(False):
        return torch.tensor(heads, dtype=torch.int32, device=device)


def _outputs(query: Tensor, keys: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, num_queries, _ = query.shape
    maps = query.new_empty(keys.shape[0], num_heads, keys.shape[1], num_queries, dtype=torch.float32)
    lse = query.new_empty((batch, heads, num_queries), dtype=torch.float32)
    return torch.empty_like(query), lse, maps


def _as_returned(maps: Tensor, *, average: bool) -> Tensor:
    return (maps.mean(dim=1, keepdim=True) if average else maps).transpose(2, 3)


@short_key_attention_maps.register_fake
def _(query: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    keys, _, heads, average = arguments[-4:]
    output, lse, maps = _outputs(query, keys, query.shape[1] if heads is None else len(heads))
    return output, lse, _as_returned(maps, average=average)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    query, key, value, key_mask, attn_mask, scale = inputs[:6]
    ctx.save_for_backward(query, key, value, output[0], output[1], key_mask, attn_mask)
    ctx.scale = scale
    ctx.mark_non_differentiable(output[1], output[2])


def _backward(ctx: Any, grad_output: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    gradients = short_key_attention_backward(grad_output, *ctx.saved_tensors, ctx.scale)
    return (*gradients, *(None,) * 7)


short_key_attention_maps.register_autograd(_backward, setup_context=_save)
