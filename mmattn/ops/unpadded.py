"""A call as rows without padding, as kernels for sequences of different lengths take it. Nothing waits for the device.

Shapes: N rows of all queries, M of all keys, B sequences, H query heads, G key/value heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from mmattn.ops import masks
from mmattn.ops.request import Request, with_positive_scale
from mmattn.ops.segments import PackedRequest


class Rows(NamedTuple):
    """What such a kernel is called with.

    Attributes:
        query: [N, H, D].
        key: [M, G, D]; rows behind the last sequence are no sequence's: to be neither read nor given a gradient.
        value: [M, G, D].
        query_starts: int32 [B + 1], where each sequence's queries begin, and where the last one's end.
        key_starts: the same of the keys. A sequence may have no keys, but not no queries.
        max_queries: queries of the longest sequence, or more.
        max_keys: keys of the longest sequence, or more.
        is_causal: each sequence is causal, aligned at its last query and key.
        scale: factor of the scores, positive.
        dropout_p: probability of dropping a weight.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    query_starts: Tensor
    key_starts: Tensor
    max_queries: int
    max_keys: int
    is_causal: bool
    scale: float
    dropout_p: float


def packed_rows(request: PackedRequest) -> Rows:
    """A packed call is rows already."""
    queries, keys = request.query_segments, request.key_segments
    query, scale = with_positive_scale(request.query, request.scale)
    return Rows(
        query=_aligned(query),
        key=_aligned(request.key),
        value=_aligned(request.value),
        query_starts=queries.cu_seqlens,
        key_starts=keys.cu_seqlens,
        max_queries=queries.longest_block,
        max_keys=keys.longest_block,
        is_causal=request.is_causal,
        scale=scale,
        dropout_p=request.dropout_p,
    )


def attend_unpadded(request: Request, attend: Callable[[Rows], Tensor]) -> tuple[Tensor, None]:
    """Serve a padded call without `attn_mask` by a kernel for rows: output [B, H, Lq, D].

    Keys that `key_mask` leaves out are neither read nor computed with, be they at the end, in front or in between; a
    sequence without keys gets zeros, where the kernel gives those.
    """
    query, key, value = request.query, request.key, request.value
    batch, _, num_queries, _ = query.shape
    num_keys = key.shape[2]
    if query.numel() == 0 or num_keys == 0:
        return masks.nothing_for(query, key, value), None
    if request.key_mask is None:
        key_rows, value_rows, key_starts = _all_rows(key), _all_rows(value), _starts(batch, num_keys, query.device)
    else:
        slots, key_starts = _slots(request.key_mask)
        key_rows, value_rows = (cast(Tensor, _KeptRows.apply(tensor, slots)) for tensor in (key, value))
    query, scale = with_positive_scale(query, request.scale)
    rows = Rows(
        query=_all_rows(query),
        key=key_rows,
        value=value_rows,
        query_starts=_starts(batch, num_queries, query.device),
        key_starts=key_starts,
        max_queries=num_queries,
        max_keys=num_keys,
        is_causal=request.is_causal,
        scale=scale,
        dropout_p=request.dropout_p,
    )
    return attend(rows).unflatten(0, (batch, num_queries)).transpose(1, 2), None


def _starts(count: int, length: int, device: torch.device) -> Tensor:
    return torch.arange(0, count * length + 1, length, dtype=torch.int32, device=device)


def _all_rows(tensor: Tensor) -> Tensor:
    """[B, H, L, D] as [B * L, H, D]: a view where it lies in memory as [B, L, H, D]."""
    return _aligned(tensor.transpose(1, 2).flatten(0, 1))


def _aligned(rows: Tensor) -> Tensor:
    """Kernels read 16 bytes at a time along D: a view that does not allow it is copied."""
    per_read = 16 // rows.element_size()
    *strides, innermost = rows.stride()
    is_fit = innermost == 1 and not any(stride % per_read for stride in strides)
    if is_fit and not torch.compiler.is_compiling():  # compiled code lays tensors out anew
        is_fit = rows.storage_offset() % per_read == 0
    return rows if is_fit else rows.contiguous()


def _slots(key_mask: Tensor) -> tuple[Tensor, Tensor]:
    """For a mask [B, Lk]: the row [B, Lk] to which each key goes, B * Lk where it goes to none; and the starts."""
    num_keys = key_mask.shape[1]
    ends = key_mask.flatten().cumsum(0)
    slots = torch.where(key_mask, ends.unflatten(0, key_mask.shape) - 1, key_mask.numel())
    return slots, F.pad(ends[num_keys - 1 :: num_keys].int(), (1, 0))


class _KeptRows(torch.autograd.Function):
    """Keys or values [B, G, Lk, D] as rows [B * Lk + 1, G, D]: those that are kept in their order, at the front. What
    a kernel leaves in the gradients of the rest is not looked at: keys that are left out get zeros."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, slots: Tensor) -> Tensor:
        ctx.save_for_backward(slots)
        rows = tensor.new_empty(slots.numel() + 1, tensor.shape[1], tensor.shape[3])
        # Not what `index_put_` gives back: compiled by torch 2.11, a Function that returns the result of an operation
        # in place gets no gradient (pytorch issue 180642).
        rows[slots] = tensor.transpose(1, 2)
        return rows

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        (slots,) = ctx.saved_tensors
        picked = grad_outputs[0][slots]
        left_out = (slots == slots.numel())[..., None, None]
        return picked.masked_fill(left_out, 0.0).transpose(1, 2), None
