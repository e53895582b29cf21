"""Attention to a fixed context whose keys and values are kept in 8 bits and widened where they are used.

Keys and values of a context are written once and read in every step, so their true scales are known. A scale belongs to
a channel of a head, or to a key of a head. Neither takes part in the products: the scale of a key's channel goes into
the query, of a value's channel into the sum at the end, and those of a key into its scores and its weights. What the
products see are 8-bit numbers, which bfloat16 and float16 hold exactly.

Shapes: B batch, H query heads, G key/value heads, Lq / Lk lengths, D head_dim. No masks, no gradients.
"""

# What Triton compiles is not what it looks like to a type checker.
# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportReturnType=false
from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmattn.kernels.blocks import (
    add_products,
    begin,
    load_keys,
    load_rows_of,
    online_softmax,
    place,
    row_products,
    scaled_rows,
    zero_blocks,
)
from mmattn.kernels.decode import DecodeConfig, decode_launches
from mmattn.kernels.decode_kernels import finish_share, place_of_share
from mmattn.kernels.launch import ACCESS_BYTES, SIZES, Launch, tensor_arguments
from mmattn.kernels.short_keys_forward import attend_resident, forward_launch, resident_fwd_kernel

PER = ("channel", "key")
# The largest number of each type that is used: -128 has no counterpart.
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


@dataclass(frozen=True)
class Context:
    """Keys and values in 8 bits.

    Attributes:
        key: int8 or float8_e4m3fn [B, G, Lk, D].
        value: the same.
        key_scales: float32 [B, G, D] of channels or [B, G, Lk] of keys, contiguous.
        value_scales: the same.
        per: what a scale belongs to, "channel" or "key".
    """

    key: Tensor
    value: Tensor
    key_scales: Tensor
    value_scales: Tensor
    per: str

    @property
    def nbytes(self) -> int:
        """What is held."""
        return sum(each.nbytes for each in (self.key, self.value, self.key_scales, self.value_scales))

    @property
    def axis(self) -> int:
        """Of a scale, among [B, G, Lk, D]: the one that it lacks."""
        return 2 if self.per == "channel" else 3

    def first(self) -> Context:
        """Of the first row of the batch."""
        tensors = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "per"}
        return dataclasses.replace(self, **{name: tensor[:1] for name, tensor in tensors.items()})

    def widened(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values [B, G, Lk, D] as `dtype` has them."""
        pairs = (self.key, self.key_scales), (self.value, self.value_scales)
        exact = torch.promote_types(dtype, torch.float32)
        key, value = ((each.to(exact) * scales.unsqueeze(self.axis)).to(dtype) for each, scales in pairs)
        return key, value


def in_8_bits(key: Tensor, value: Tensor, dtype: torch.dtype, per: str) -> Context:
    """Keys and values [B, G, Lk, D], nothing empty and all finite, rounded to the nearest of `dtype` (int8 or
    float8_e4m3fn); the largest of each channel, or of each key, is that type's largest. Raises ValueError if `per` is
    neither."""
    if per not in PER:
        raise ValueError(f"a scale per {per!r}: there is one per {' or per '.join(PER)}")
    axis, found = 2 if per == "channel" else 3, []
    for tensor in (key, value):
        largest = tensor.float().abs().amax(axis, keepdim=True)
        scales = torch.where(largest == 0, 1.0, largest / LARGEST[dtype])
        numbers = tensor.float() / scales
        numbers = numbers.round() if dtype is torch.int8 else numbers
        found.append((numbers.clamp(-LARGEST[dtype], LARGEST[dtype]).to(dtype), scales.squeeze(axis).contiguous()))
    (key, key_scales), (value, value_scales) = found
    return Context(key, value, key_scales, value_scales, per)


@triton.jit
def _widened(blocks, like, DIM_TILES: tl.constexpr):
    """Blocks [N, D] of 8-bit numbers, exactly, in the type of another block."""
    wide = ()
    for d in tl.static_range(len(DIM_TILES)):
        wide = wide + (blocks[d].to(like.dtype),)
    return wide


@triton.jit
def _scaled_columns(blocks, scales, HEAD_DIM: tl.constexpr, DIM_TILES: tl.constexpr):
    """Blocks [M or N, D] in float32, each column times its scale [D]."""
    scaled = ()
    for d in tl.static_range(len(DIM_TILES)):
        columns = DIM_TILES[d][0] + tl.arange(0, DIM_TILES[d][1])
        factors = tl.load(scales + columns, mask=columns < HEAD_DIM, other=0.0)
        scaled = scaled + (blocks[d].to(tl.float32) * factors[None, :],)
    return scaled


@triton.jit(do_not_specialize=(*SIZES, "blocks_per_split", "num_rows"))
def walk_8bit_kernel(
    query_ptr, key_ptr, value_ptr, key_scales_ptr, value_scales_ptr, output_ptr, partial_ptr, statistics_ptr,
    query_strides, key_strides, value_strides, output_strides, partial_strides,
    scale, num_heads, group, num_queries, num_keys, num_chunks, num_splits, blocks_per_split, num_rows,
    HEAD_DIM: tl.constexpr, DIM_TILES: tl.constexpr, UNIT: tl.constexpr, KEY_UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, IS_SPLIT: tl.constexpr, IS_PER_CHANNEL: tl.constexpr,
):  # fmt: skip
    """As `decode_kernel`: a program has one key/value head of one batch row, a share of its keys, and BLOCK_M of the
    queries of its group. Of a key whole blocks are read in 8 bits."""
    batch, kv_head, split, rows, is_row, positions, heads, query = place_of_share(
        query_ptr, query_strides, num_heads, group, num_queries, num_chunks, num_splits,
        HEAD_DIM, DIM_TILES, UNIT, BLOCK_M,
    )  # fmt: skip
    place_of_scales = (batch * num_heads + kv_head) * (HEAD_DIM if IS_PER_CHANNEL else num_keys)
    key_scales = key_scales_ptr + place_of_scales
    value_scales = value_scales_ptr + place_of_scales
    if IS_PER_CHANNEL:
        query = _widened(_scaled_columns(query, key_scales, HEAD_DIM, DIM_TILES), query[0], DIM_TILES)

    row_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    total = tl.full([BLOCK_M], 0.0, dtype=tl.float32)
    output = zero_blocks(BLOCK_M, DIM_TILES)
    keys = tl.arange(0, BLOCK_N)
    first = split * blocks_per_split
    for block in tl.range(first, tl.minimum(first + blocks_per_split, tl.cdiv(num_keys, BLOCK_N))):
        start = block * BLOCK_N
        far = start.to(tl.int64)
        is_key = keys < num_keys - start
        key = load_rows_of(key_ptr, key_strides, batch, kv_head, far, keys, is_key, HEAD_DIM, DIM_TILES, KEY_UNIT)
        value = load_rows_of(value_ptr, value_strides, batch, kv_head, far, keys, is_key, HEAD_DIM, DIM_TILES, KEY_UNIT)
        scores = row_products(query, _widened(key, query[0], DIM_TILES), DIM_TILES) * scale
        if not IS_PER_CHANNEL:
            scores *= tl.load(key_scales + start + keys, mask=is_key, other=0.0)[None, :]
        scores = tl.where(is_key[None, :], scores, float("-inf"))
        weights, factors, total, row_max = online_softmax(scores, total, row_max)
        if not IS_PER_CHANNEL:
            weights *= tl.load(value_scales + start + keys, mask=is_key, other=0.0)[None, :]
        output = scaled_rows(output, factors, DIM_TILES)
        output = add_products(output, weights, _widened(value, query[0], DIM_TILES), DIM_TILES)

    if IS_PER_CHANNEL:
        output = _scaled_columns(output, value_scales, HEAD_DIM, DIM_TILES)
    finish_share(
        output, total, row_max, output_ptr, partial_ptr, statistics_ptr, output_strides, partial_strides,
        batch, kv_head, split, rows, is_row, positions, heads, num_heads, group, num_queries, num_splits, num_rows,
        HEAD_DIM, DIM_TILES, UNIT, IS_SPLIT,
    )  # fmt: skip


@triton.jit
def _dequantised(
    blocks, scales, num_keys, like,
    KEY_TILES: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_TILES: tl.constexpr, IS_PER_CHANNEL: tl.constexpr,
):  # fmt: skip
    """All blocks of keys, or of values, times their scales, in the type that the pointer `like` points to."""
    done = ()
    for n in tl.static_range(len(KEY_TILES)):
        if IS_PER_CHANNEL:
            scaled = _scaled_columns(blocks[n], scales, HEAD_DIM, DIM_TILES)
        else:
            keys = KEY_TILES[n][0] + tl.arange(0, KEY_TILES[n][1])
            factors = tl.load(scales + keys, mask=keys < num_keys, other=0.0)
            scaled = ()
            for d in tl.static_range(len(DIM_TILES)):
                scaled = scaled + (blocks[n][d].to(tl.float32) * factors[:, None],)
        wide = ()
        for d in tl.static_range(len(DIM_TILES)):
            wide = wide + (scaled[d].to(like.dtype.element_ty),)
        done = done + (wide,)
    return done


@triton.jit(do_not_specialize=SIZES)
def resident_8bit_kernel(
    query_ptr, key_ptr, value_ptr, key_scales_ptr, value_scales_ptr, output_ptr, lse_ptr,
    query_strides, key_strides, value_strides, output_strides,
    scale, num_heads, group, num_queries, num_keys, num_chunks,
    HEAD_DIM: tl.constexpr, DIM_TILES: tl.constexpr, KEY_TILES: tl.constexpr, UNIT: tl.constexpr,
    KEY_UNIT: tl.constexpr, BLOCK_M: tl.constexpr, ROW_BLOCKS: tl.constexpr, IS_PER_CHANNEL: tl.constexpr,
    IS_EARLY: tl.constexpr,
):  # fmt: skip
    """As `resident_fwd_kernel`: a program holds all keys and values of a head, so that it widens them once."""
    begin(IS_EARLY)
    head, chunk, batch = place(num_heads, num_chunks)
    batch = batch.to(tl.int64)
    kv_head = head // group
    key, value, is_key = load_keys(
        key_ptr, value_ptr, key_ptr, key_strides, value_strides, (0, 0, 0), batch, kv_head, 0,
        num_keys, KEY_TILES, HEAD_DIM, DIM_TILES, KEY_UNIT, False,
    )  # fmt: skip
    place_of_scales = (batch * (num_heads // group) + kv_head) * (HEAD_DIM if IS_PER_CHANNEL else num_keys)
    key = _dequantised(
        key, key_scales_ptr + place_of_scales, num_keys, query_ptr, KEY_TILES, HEAD_DIM, DIM_TILES, IS_PER_CHANNEL
    )  # fmt: skip
    value = _dequantised(
        value, value_scales_ptr + place_of_scales, num_keys, query_ptr, KEY_TILES, HEAD_DIM, DIM_TILES, IS_PER_CHANNEL
    )  # fmt: skip
    for block in tl.range(ROW_BLOCKS):
        attend_resident(
            query_ptr, output_ptr, lse_ptr, query_ptr, query_strides, output_strides, (0, 0, 0, 0),
            key, value, is_key, scale, num_heads, num_queries, batch, head, (chunk * ROW_BLOCKS + block) * BLOCK_M,
            HEAD_DIM, DIM_TILES, KEY_TILES, UNIT, BLOCK_M, False,
        )  # fmt: skip


def _as_8_bits(launch: Launch, kernel: object, context: Context) -> Launch:
    """The launch of a kernel for two-byte keys, of one for 8 bits instead."""
    unit = math.gcd(ACCESS_BYTES, *(each for tensor in (context.key, context.value) for each in tensor.stride()[:-1]))
    kept = {
        name: value
        for name, value in launch.arguments.items()
        if "mask" not in name.lower() and name != "IS_CAUSAL"
    }  # fmt: skip
    kept |= {"key_scales_ptr": context.key_scales, "value_scales_ptr": context.value_scales}
    kept |= tensor_arguments(unit, key=context.key, value=context.value)
    kept |= {"KEY_UNIT": unit, "IS_PER_CHANNEL": context.per == "channel"}
    return dataclasses.replace(launch, kernel=kernel, arguments=kept)


def walk_launches(
    query: Tensor, context: Context, scale: float, output: Tensor, config: DecodeConfig | None = None
) -> tuple[Launch, ...]:
    """The launches that fill `output` [B, H, Lq, D], one after the other, for any numbers of queries [B, H, Lq, D] and
    of keys, which are shared out as `decode_launches` does."""
    first, *rest = decode_launches(query, context.key, context.value, None, None, False, scale, output, config)
    return _as_8_bits(first, walk_8bit_kernel, context), *rest


def resident_launch(query: Tensor, context: Context, scale: float, output: Tensor, lse: Tensor) -> Launch | None:
    """The launch that fills `output` [B, H, Lq, D] and `lse` (float32 [B, H, Lq]) with all keys held by a program, as
    `forward_launch` does; None for more keys than that."""
    launch = forward_launch(query, context.key, context.value, None, None, scale, output, lse)
    return _as_8_bits(launch, resident_8bit_kernel, context) if launch.kernel is resident_fwd_kernel else None


def launches_8bit(
    query: Tensor, context: Context, scale: float, output: Tensor, config: DecodeConfig | None = None
) -> tuple[Launch, ...]:
    """The launches that fill `output`. A program holds all keys where there are more queries than a block of decoding
    takes, and the keys fit; it walks over them else, and wherever a configuration for that is given."""
    if config is None and query.shape[2] > DecodeConfig().block_m:
        lse = query.new_empty(query.shape[:3], dtype=torch.float32)
        launch = resident_launch(query, context, scale, output, lse)
        if launch is not None:
            return (launch,)
    return walk_launches(query, context, scale, output, config)


def attend_8bit(query: Tensor, context: Context, scale: float, config: DecodeConfig | None = None) -> Tensor:
    """softmax(scale * query @ key^T) @ value: [B, H, Lq, D], by `launches_8bit`."""
    output = torch.empty_like(query)
    for launch in launches_8bit(query, context, scale, output, config):
        launch.run(query.device)
    return output
