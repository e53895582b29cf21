"""Masks: boolean, True = may attend. What they mean, how they combine, what they leave over.

Shapes: B batch, H query heads, G key/value heads, Lq / Lk lengths, D head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmattn.errors import UsageError


def causal_mask(
    num_queries: int, num_keys: int, *, offset: int | None = None, device: torch.device | str = "cpu"
) -> Tensor:
    """Boolean [Lq, Lk]: query i may attend to keys j <= i + offset.

    Without an offset the mask is bottom-right aligned: the last query sees every key, as a decoding step over a
    cache needs. `torch`'s own `is_causal` is top-left aligned (offset 0); the two agree only when Lq == Lk.
    """
    if offset is None:
        offset = num_keys - num_queries
    queries = torch.arange(num_queries, device=device).unsqueeze(1)
    keys = torch.arange(num_keys, device=device)
    return keys <= queries + offset


def sliding_window_mask(num_queries: int, num_keys: int, window: int, *, device: torch.device | str = "cpu") -> Tensor:
    """Boolean [Lq, Lk]: causal (bottom-right aligned), and at most the last `window` keys, a query's own included.

    Raises:
        UsageError: if `window` is not positive.
    """
    if window < 1:
        raise UsageError(f"sliding_window_mask: window is {window}, it must be at least 1")
    offset = num_keys - num_queries
    queries = torch.arange(num_queries, device=device).unsqueeze(1) + offset
    keys = torch.arange(num_keys, device=device)
    return (keys <= queries) & (keys > queries - window)


def lengths_mask(lengths: Tensor, num_keys: int) -> Tensor:
    """Boolean key mask [B, Lk] for right-padded rows of the given lengths [B]."""
    return torch.arange(num_keys, device=lengths.device) < lengths.unsqueeze(1)


def as_four_dim(attn_mask: Tensor, batch: int, heads: int, num_queries: int, num_keys: int) -> Tensor:
    """Give a mask of rank 2 [Lq, Lk], 3 [B, Lq, Lk] or 4 [B, H, Lq, Lk] its four axes; axes of size 1 broadcast.

    Raises:
        UsageError: when the rank, the dtype or a size does not fit; the rank alone decides what the axes mean.
    """
    if attn_mask.dtype is not torch.bool and not attn_mask.is_floating_point():
        raise UsageError(
            f"attention: attn_mask is {attn_mask.dtype}; give a boolean mask (True = may attend) or a float bias"
        )
    rank = attn_mask.dim()
    if rank == 2:
        four = attn_mask[None, None]
    elif rank == 3:
        four = attn_mask.unsqueeze(1)
    elif rank == 4:
        four = attn_mask
    else:
        raise UsageError(f"attention: attn_mask has rank {rank}; use [Lq, Lk], [B, Lq, Lk] or [B, H, Lq, Lk]")
    wanted = (batch, heads, num_queries, num_keys)
    # Not `in (1, full)`: torch.compile compares a tuple's sizes as objects, and a dynamic one is never a number.
    if any(size != 1 and size != full for size, full in zip(four.shape, wanted, strict=True)):
        hint = "; for padding [B, Lk] use key_mask" if rank == 2 and attn_mask.shape == (batch, num_keys) else ""
        raise UsageError(
            f"attention: attn_mask {list(attn_mask.shape)} does not broadcast to [B, H, Lq, Lk] = {list(wanted)}{hint}"
        )
    if four.shape[-1] != num_keys:
        four = four.expand(*four.shape[:-1], num_keys)
    return four


def split_bias(attn_mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """(allowed, bias) of a four-axis mask: -inf in a float bias means "may not attend", the rest is added to scores.

    The bias comes back finite: -inf is replaced by 0, so that no arithmetic on it makes NaN.
    """
    if attn_mask is None or attn_mask.dtype is torch.bool:
        return attn_mask, None
    allowed = attn_mask > float("-inf")
    return allowed, attn_mask.masked_fill(~allowed, 0.0)


def in_dtype(bias: Tensor, dtype: torch.dtype) -> Tensor:
    """A float bias in a dtype in which what is finite stays finite: a number that is too large becomes the largest,
    for as -inf it would say "may not attend"."""
    if torch.finfo(bias.dtype).max > torch.finfo(dtype).max:
        least, most = torch.finfo(dtype).min, torch.finfo(dtype).max
        bias = torch.where(bias > float("-inf"), bias.clamp(least, most), bias)
    return bias.to(dtype)


def combine(*masks: Tensor | None) -> Tensor | None:
    """The "and" of boolean masks that broadcast with one another; None stands for "no limit"."""
    result: Tensor | None = None
    for mask in masks:
        if mask is not None:
            result = mask if result is None else result & mask
    return result


def used_keys(allowed: Tensor, num_kv_heads: int) -> Tensor:
    """Which keys any query may attend to: boolean [b, g, Lk, 1] with b in (1, B) and g in (1, G).

    Keys outside are set to zero before any product: 0 * NaN is NaN, so a weight of 0 alone does not keep a NaN out.
    """
    used = allowed.any(dim=-2) if allowed.shape[-2] != 1 else allowed.squeeze(-2)
    batch, heads, num_keys = used.shape
    if heads != 1 and heads != num_kv_heads:
        used = used.reshape(batch, num_kv_heads, heads // num_kv_heads, num_keys).any(dim=2)
    return used.unsqueeze(-1)


def zero_unused(key: Tensor, value: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values [B, G, Lk, D] with zeros where no query may look, see `used_keys`."""
    unused = ~used_keys(allowed, key.shape[1])
    return key.masked_fill(unused, 0.0), value.masked_fill(unused, 0.0)


def empty_rows(allowed: Tensor) -> Tensor:
    """Rows that may attend to nothing: boolean [b, h, q, 1]. Their output, weights and gradients are zero."""
    return ~allowed.any(dim=-1, keepdim=True)


def nothing_for(query: Tensor, *others: Tensor | None) -> Tensor:
    """The output [B, H, Lq, D] where there is nothing to attend to: zeros, whose backward gives the query zeros, and
    the others (keys, values, a mask) too: who wrote them need not know (DDP waits for every parameter's gradient)."""
    output = query.masked_fill(torch.ones((), dtype=torch.bool, device=query.device), 0.0)
    for other in others:
        if other is not None and torch.is_grad_enabled() and other.is_floating_point():
            output = output + other[..., :0].sum()
    return output


def key_spans(key_mask: Tensor) -> tuple[list[tuple[int, int]], bool]:
    """Per row of a CPU key mask [B, Lk] the half-open span (first, last + 1) of its valid keys, and "no row has gaps".

    Rows without a valid key have the span (0, 0). Works on the mask's bytes: decoding asks in every step of every
    layer, and a handful of tensor operations would take longer than the attention itself. Whatever is not 0 is True: so
    are the 255s of a picture's mask that numpy views as booleans.
    """
    num_keys = key_mask.shape[1]
    data = key_mask.detach().numpy().tobytes()
    if b"\0" not in data:
        return [(0, num_keys)] * key_mask.shape[0], True
    spans = []
    is_contiguous = True
    zeros = bytes(num_keys)
    for first in range(0, len(data), num_keys):
        row = data[first : first + num_keys]
        start, end = 0, row.find(b"\0")
        if end < 0:
            end = num_keys
        elif row[end:] != zeros[end:]:  # not padded on the right alone
            start, end = num_keys - len(row.lstrip(b"\0")), len(row.rstrip(b"\0"))
            is_contiguous = is_contiguous and row.find(b"\0", start, end) < 0
        spans.append((start, end))
    return spans, is_contiguous
