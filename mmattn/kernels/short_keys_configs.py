"""Block sizes, warps and pipeline depth of the short-key kernels: a small fixed table, nothing tuned at run time.

Entries are looked up by what the head and the keys take up in blocks (`tiles.padded`); a pair that was not measured
gets what `_estimated_*` say. docs/kernels.md has the measurements, scripts/gpu/short_keys.py makes them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from mmattn.kernels.launch import Card
from mmattn.kernels.tiles import MIN_TILE, Tiles, one_tile, padded, power_of_two, tiles_of, tiles_up_to

# Scores of 64 queries by 256 keys are 128 registers a thread of four warps.
_RESIDENT_KEYS = 256
# On cards whose matrix instructions are a warp's, they spill from there.
_RESIDENT_KEYS_WARPS = 128
_KEY_BLOCK = 128
# float32 takes twice the room, and three instructions for a product.
_RESIDENT_KEYS_FLOAT32 = 32
_KEY_BLOCK_FLOAT32 = 32
_HEAD_BLOCK_FLOAT32 = 32
_FUSED_BACKWARD_ELEMENTS_FLOAT32 = 64 * 64
# float32 gradients of keys and values in registers, of four or eight warps.
_FUSED_BACKWARD_KEYS = 128
_FUSED_BACKWARD_ELEMENTS = 128 * 128


@dataclass(frozen=True)
class ForwardConfig:
    """Attributes: queries a block, blocks a program (all with the same keys), warps, pipeline depth, whether heads and
    keys are cut into two blocks instead of padded to the next power of two, and the most queries, of all heads of all
    the batch, for which that was measured to be faster."""

    block_m: int = 64
    row_blocks: int = 1
    num_warps: int = 4
    num_stages: int = 2
    is_head_cut: bool = True
    are_keys_cut: bool = True
    most_queries: int = 1 << 62


@dataclass(frozen=True)
class BackwardConfig:
    """Attributes: queries a block, keys a block where not all fit, programs per processor of the device that the
    queries are split for, warps, pipeline depth, whether heads and keys are cut into two blocks, and whether one
    program holds all keys and writes the gradients of its queries too."""

    block_m: int = 64
    block_n: int = 64
    programs_per_processor: float = 2.0
    num_warps: int = 4
    num_stages: int = 2
    is_head_cut: bool = True
    are_keys_cut: bool = True
    is_fused: bool = True


@dataclass(frozen=True)
class SplitConfig:
    """Of the backward by programs that compute one gradient each. Attributes: queries a block, programs per processor
    that gradients of keys and values are shared out among, warps, pipeline depth, and the most queries, and the most
    and fewest heads of all the batch, for which that was measured to be faster."""

    block_m: int = 128
    programs_per_processor: float = 1.0
    num_warps: int = 8
    num_stages: int = 1
    most_queries: int = 1 << 30
    most_heads: int = 1 << 30
    fewest_heads: int = 1


_Config = TypeVar("_Config", ForwardConfig, BackwardConfig)

# (head, keys) in blocks -> configuration, for two-byte types: the fastest of those tried on an H200 (docs/kernels.md).
# Of several the first that has room for the call.
FORWARD: dict[tuple[int, int], tuple[ForwardConfig, ...]] = {
    (48, 80): (ForwardConfig(row_blocks=4, num_stages=3),),
    (64, 80): (ForwardConfig(num_stages=1, most_queries=160 * 1024), ForwardConfig(row_blocks=4, num_stages=3)),
    (80, 80): (
        ForwardConfig(block_m=128, num_warps=8, num_stages=1, most_queries=64 * 1024),
        ForwardConfig(block_m=128, num_stages=1),
    ),
    (160, 80): (ForwardConfig(num_stages=1, most_queries=64 * 256), ForwardConfig(128, 2, 8, 2)),
}
BACKWARD: dict[tuple[int, int], BackwardConfig] = {
    (48, 80): BackwardConfig(),
    (64, 80): BackwardConfig(),
    (80, 80): BackwardConfig(block_m=128, num_warps=8, num_stages=1, are_keys_cut=False),
    (160, 80): BackwardConfig(block_m=128, num_warps=8, num_stages=1, are_keys_cut=False),
}
# The same, where there are few queries.
SPLIT_BACKWARD: dict[tuple[int, int], tuple[SplitConfig, ...]] = {
    (64, 80): (SplitConfig(64, 2.0, 4, 2, most_queries=1024, most_heads=80),),
    (160, 80): (
        SplitConfig(128, 1.0, 8, 2, most_queries=256, most_heads=32),
        SplitConfig(64, 1.0, 4, 1, most_queries=256, most_heads=128, fewest_heads=33),
    ),
}


def forward_config(
    card: Card, dtype: torch.dtype, head_dim: int, num_keys: int, num_queries: int, num_heads: int
) -> ForwardConfig:
    """The forward's configuration for a call; `num_heads` are those of all the batch."""
    sizes = padded(head_dim), padded(num_keys)
    measured = FORWARD.get(sizes, ()) if dtype.itemsize == 2 and card.has_warp_groups else ()
    fitting = (config for config in measured if num_heads * num_queries <= config.most_queries)
    config = next(fitting, None) or _estimated_forward(card, dtype, *sizes)
    return _for_few_queries(config, num_queries)


def backward_config(
    card: Card, dtype: torch.dtype, head_dim: int, num_keys: int, num_queries: int, num_heads: int
) -> BackwardConfig | SplitConfig:
    """The backward's configuration for a call; `num_heads` are those of all the batch."""
    sizes = padded(head_dim), padded(num_keys)
    is_measured = dtype.itemsize == 2 and card.has_warp_groups
    for split in SPLIT_BACKWARD.get(sizes, ()) if is_measured else ():
        is_its_number = split.fewest_heads <= num_heads <= split.most_heads
        if split.block_m < num_queries <= split.most_queries and is_its_number:
            return split
    config = BACKWARD.get(sizes) if is_measured else None
    config = config or _estimated_backward(card, dtype, *sizes)
    return _for_few_queries(config, num_queries)


def resident_keys(card: Card, dtype: torch.dtype) -> int:
    """How many keys, in blocks, a program of the forward may hold."""
    if dtype.itemsize > 2:
        return _RESIDENT_KEYS_FLOAT32
    return _RESIDENT_KEYS if card.has_warp_groups else _RESIDENT_KEYS_WARPS


def head_tiles(dtype: torch.dtype, head_dim: int, is_cut: bool) -> Tiles:
    """The blocks of a head."""
    if dtype.itemsize > 2:
        return tiles_up_to(_HEAD_BLOCK_FLOAT32, head_dim)
    return tiles_of(head_dim) if is_cut else one_tile(head_dim)


def key_block(dtype: torch.dtype) -> int:
    """Keys a block where a program walks over them."""
    return _KEY_BLOCK if dtype.itemsize == 2 else _KEY_BLOCK_FLOAT32


def _estimated_forward(card: Card, dtype: torch.dtype, dim: int, keys: int) -> ForwardConfig:
    if dtype.itemsize > 2:
        return ForwardConfig(block_m=32, num_warps=4, num_stages=1)
    # Beyond what a program holds, and there already without warp groups: scores and output of wide heads.
    is_wide = dim > 128 and keys > (resident_keys(card, dtype) if card.has_warp_groups else 80)
    return ForwardConfig(num_warps=8 if is_wide else 4)


def _estimated_backward(card: Card, dtype: torch.dtype, dim: int, keys: int) -> BackwardConfig:
    # Without warp groups blocks of 64 + 16 keys take more registers than one of 128.
    are_keys_cut = card.has_warp_groups
    held = keys if are_keys_cut else power_of_two(keys)
    most = _FUSED_BACKWARD_ELEMENTS if dtype.itemsize == 2 else _FUSED_BACKWARD_ELEMENTS_FLOAT32
    fits = held <= _FUSED_BACKWARD_KEYS and held * dim <= most
    if dtype.itemsize > 2:
        return BackwardConfig(block_m=32, block_n=32, num_warps=8, num_stages=1, is_fused=fits)
    if not fits:
        return BackwardConfig(num_warps=8 if dim > 128 else 4, is_fused=False)
    return BackwardConfig(num_warps=8 if held * dim > _FUSED_BACKWARD_ELEMENTS // 2 else 4, are_keys_cut=are_keys_cut)


def _for_few_queries(config: _Config, num_queries: int) -> _Config:
    """No block larger than the queries need."""
    block_m = max(MIN_TILE, min(config.block_m, power_of_two(num_queries)))
    return config if block_m == config.block_m else replace(config, block_m=block_m)
