"""Attention of a few queries to many keys as an operation of `torch.library`: what torch.compile keeps in its graph as
it is. `decode_kernels` has the kernels.

Shapes: B batch, H query heads, G key/value heads, Lq / Lk lengths, D head_dim.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmattn.kernels.blocks import LOG2_E
from mmattn.kernels.decode_kernels import add_splits_kernel, decode_kernel
from mmattn.kernels.launch import Card, Launch, access_unit, card_of, mask_arguments, tensor_arguments
from mmattn.kernels.plain import is_plain_call
from mmattn.kernels.plans import Plans
from mmattn.kernels.short_keys_configs import head_tiles
from mmattn.kernels.tiles import MIN_TILE, Tiles, ceil_div, power_of_two, tiles_of

MAX_QUERIES = 16
MAX_HEAD_DIM = 160
MAX_SPLITS = 128
_SPLITS_AT_ONCE = 32
_WARP_COLUMNS = 32
# Of the best use of the processors: with less of it fewer shares do.
_ENOUGH = 0.85
# Every round begins with an empty pipeline.
_MOST_ROUNDS = 4
# Keys: a cache grows by one a step, and until it needs another block all else is as before.
_PLANS = Plans(("query", "key", "value", "output", "key_mask", "attn_mask"), varying=("num_keys",))


@dataclass(frozen=True)
class DecodeConfig:
    """Attributes: most queries of a group a program, keys a block, warps, pipeline depth, and how many programs run on
    a processor at a time, which keys are shared out for."""

    block_m: int = 64
    block_n: int = 128
    num_warps: int = 4
    num_stages: int = 3
    programs_per_processor: int = 2


def decode_config(dtype: torch.dtype, head_dim: int) -> DecodeConfig:
    """The configuration for a call: about 32 KiB of keys and values a block, so that two programs with their pipelines
    fit a processor."""
    if dtype.itemsize > 2:
        return DecodeConfig(block_m=32, block_n=32, num_stages=2)
    return DecodeConfig(block_n=128 if head_dim <= 64 else 64)


def dim_tiles(dtype: torch.dtype, head_dim: int) -> Tiles:
    """The blocks of a head. Warps lie side by side, each over 8 of a block's columns: in blocks of less than 32 they
    would do the same twice, and take more registers."""
    if dtype.itemsize > 2:
        return head_tiles(dtype, head_dim, is_cut=True)
    return tiles_of(ceil_div(head_dim, _WARP_COLUMNS) * _WARP_COLUMNS)


@functools.lru_cache(maxsize=1024)
def shares(num_programs: int, num_blocks: int, card: Card, programs_per_processor: int) -> tuple[int, int]:
    """(how many shares, blocks of keys in each), for `num_programs` programs a share.

    As few as fill the processors nearly as well as any number does: programs take about as long as one another, so what
    counts is how full their last round is.
    """
    places = card.processors * programs_per_processor
    choices: list[tuple[float, int, int]] = []
    for wanted in range(1, min(num_blocks, MAX_SPLITS) + 1):
        blocks = ceil_div(num_blocks, wanted)
        splits = ceil_div(num_blocks, blocks)
        rounds = ceil_div(num_programs * splits, places)
        if rounds > _MOST_ROUNDS and choices:
            break
        # All blocks, against those that there is time for until the last program has ended.
        choices.append((num_programs * num_blocks / (rounds * blocks * places), splits, blocks))
    best = max(use for use, _, _ in choices)
    return next((splits, blocks) for use, splits, blocks in choices if use >= _ENOUGH * best)


def decode_launches(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
    output: Tensor,
    config: DecodeConfig | None = None,
) -> tuple[Launch, ...]:
    """The launches that fill `output`, one after the other.

    Args:
        query: [B, H, Lq, D], any strides; nothing is empty.
        key: [B, G, Lk, D].
        value: [B, G, Lk, D].
        key_mask: boolean, broadcastable to [B, G, Lk].
        attn_mask: boolean, broadcastable to [B, H, Lq, Lk].
        is_causal: query i may attend to keys j <= i + Lk - Lq.
        scale: factor of the scores.
        output: [B, H, Lq, D], to be written.
        config: block sizes; `decode_config`'s by default.
    """
    batch, heads, num_queries, head_dim = query.shape
    kv_heads, num_keys = key.shape[1:3]
    config = config or decode_config(query.dtype, head_dim)
    group, num_rows = heads // kv_heads, batch * heads * num_queries
    block_m = max(MIN_TILE, min(config.block_m, power_of_two(group * num_queries)))
    num_chunks, num_blocks = ceil_div(group * num_queries, block_m), ceil_div(num_keys, config.block_n)
    num_programs = num_chunks * kv_heads * batch
    card = card_of(query.device)
    num_splits, blocks_per_split = shares(num_programs, num_blocks, card, config.programs_per_processor)
    unit = access_unit(query, key, value, output)
    shared: dict[str, Any] = dict(
        **tensor_arguments(unit, output=output),
        num_queries=num_queries,
        num_splits=num_splits,
        num_rows=num_rows,
        HEAD_DIM=head_dim,
        DIM_TILES=dim_tiles(query.dtype, head_dim),
        UNIT=unit,
    )
    is_split = num_splits > 1
    # What is not there is another tensor's pointer, never read.
    shared |= {"partial_ptr": output, "statistics_ptr": output}
    if is_split:
        shared["partial_ptr"] = query.new_empty(num_splits, num_rows, head_dim, dtype=torch.float32)
        shared["statistics_ptr"] = query.new_empty(2, num_splits, num_rows, dtype=torch.float32)
    arguments = shared | dict(
        **tensor_arguments(unit, query=query, key=key, value=value),
        **mask_arguments(query, key, key_mask, attn_mask),
        partial_strides=(0, 0, head_dim, 1),
        scale=scale * LOG2_E.value,
        num_heads=kv_heads,
        group=group,
        num_keys=num_keys,
        num_chunks=num_chunks,
        blocks_per_split=blocks_per_split,
        BLOCK_M=block_m,
        BLOCK_N=config.block_n,
        IS_SPLIT=is_split,
        IS_CAUSAL=is_causal and num_queries > 1,
    )
    attend = Launch(decode_kernel, num_programs * num_splits, arguments, config.num_warps, config.num_stages)
    if not is_split:
        return (attend,)
    most = max(MIN_TILE, power_of_two(num_splits))
    blocks = {"MOST_SPLITS": most, "BLOCK_S": min(most, _SPLITS_AT_ONCE)}
    return attend, Launch(add_splits_kernel, num_rows, shared | blocks | {"num_heads": heads}, 4, 1)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
) -> Tensor:
    """`decode_attention`, at the least cost to the processor: ordinary eager calls go round the dispatcher. The kernels
    are the same, and so are all bits."""
    wants_grad = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    # Of gradients the operation says that there are none.
    is_round = not wants_grad and is_plain_call(query, key, value, key_mask, attn_mask)
    return (_decode if is_round else decode_attention)(query, key, value, key_mask, attn_mask, is_causal, scale)


@torch.library.custom_op("mmattn::decode_attention", mutates_args=())
def decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
) -> Tensor:
    """softmax(scale * query @ key^T) @ value for a few queries; without gradients, the same bits in every run.

    A row that may attend to nothing gives zeros. Keys and values that no row of a program may attend to are not read.

    Args:
        query: [B, H, Lq, D], float32, bfloat16 or float16, any strides; made for Lq up to `MAX_QUERIES`, D at most
            `MAX_HEAD_DIM`.
        key: [B, G, Lk, D], H a multiple of G, same dtype.
        value: [B, G, Lk, D].
        key_mask: boolean, broadcastable to [B, G, Lk], True = may be attended to.
        attn_mask: boolean [B or 1, H or 1, Lq or 1, Lk], True = may attend.
        is_causal: query i may attend to keys j <= i + Lk - Lq.
        scale: factor of the scores.

    Returns:
        [B, H, Lq, D] in the order of axes that query has in memory.
    """
    return _decode(query, key, value, key_mask, attn_mask, is_causal, scale)


def _decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
) -> Tensor:
    output = torch.empty_like(query)
    if query.numel() == 0 or key.numel() == 0:
        return output.zero_()
    num_keys = key.shape[2]
    num_blocks = ceil_div(num_keys, decode_config(query.dtype, query.shape[3]).block_n)
    own = (query.shape, query.stride(), key.shape[1], num_blocks, key.stride(), value.stride())
    masks = (_layout(key_mask), _layout(attn_mask))
    _PLANS.launch(
        (query.device, query.dtype, own, masks, is_causal, scale),
        (query, key, value, output, key_mask, attn_mask),
        lambda: decode_launches(query, key, value, key_mask, attn_mask, is_causal, scale, output),
        (num_keys,),
    )
    return output


def _layout(mask: Tensor | None) -> tuple[Any, ...] | None:
    """Of a mask what launches depend on: its last axis is as long as the keys, if it is not 1."""
    return None if mask is None else (mask.shape[:-1], mask.shape[-1] == 1, mask.stride())


@decode_attention.register_fake
def _(query: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(query)
