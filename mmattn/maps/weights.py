"""Attention weights recomputed from queries and keys, in chunks, for the keys and heads that are wanted.

H query heads, G key/value heads, Lq / Lk lengths, D head_dim, T keys kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_CHUNK_BYTES = 4 * 2**20  # of the scores that are held at a time


@dataclass(frozen=True, eq=False, slots=True)
class RowCall:
    """One row of a batch in an attention call.

    Attributes:
        query: [H, Lq, D].
        key: [G, Lk, D].
        scale: factor of the scores.
        mask: boolean (True = may attend) or float (added to the scores), broadcastable to [H, Lq, Lk]; None: no mask.
        log_sum_exp: [H, Lq], of the masked scores, where the fused kernel has said it.
    """

    query: Tensor
    key: Tensor
    scale: float
    mask: Tensor | None = None
    log_sum_exp: Tensor | None = None


def kept_weights(
    call: RowCall, *, keys: Tensor | None = None, heads: Sequence[int] | None = None, average: bool = False
) -> Tensor:
    """softmax(scale * query @ key^T) of some keys and heads: float32 `[H', Lq, T]`, or `[1, Lq, T]`, averaged.

    With the log-sum-exp only the scores of the kept keys are computed. A query that may attend to nothing has zeros.

    Args:
        call: what was attended to.
        keys: int64 [T], the keys to keep; None: all.
        heads: the heads to keep; None: all.
        average: over those heads.
    """
    # Not in inference mode either: what is kept is added to later, outside of it.
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(call.query.device.type, enabled=False):
        return _kept(call, keys, heads, average)


def _kept(call: RowCall, keys: Tensor | None, heads: Sequence[int] | None, average: bool) -> Tensor:
    query, key, lse, mask = call.query.detach(), call.key.detach(), call.log_sum_exp, call.mask
    group = query.shape[0] // key.shape[0]
    if heads is not None:
        picked = torch.as_tensor(list(heads), device=query.device)
        mask = mask if mask is None or mask.shape[0] == 1 else mask[picked]
        query, lse = query[picked], None if lse is None else lse.detach()[picked]
        key = key[picked // group]
    elif group > 1:
        key = key.repeat_interleave(group, dim=0)
    dtype = torch.promote_types(query.dtype, torch.float32)
    if keys is not None and lse is not None:
        key = key.index_select(1, keys)
        mask = mask if mask is None or mask.shape[2] == 1 else mask.index_select(2, keys)
    columns = key.to(dtype).transpose(1, 2)
    num_heads, length = query.shape[:2]
    width = columns.shape[2] if keys is None or lse is not None else len(keys)
    shape = (1 if average else num_heads, length, width)
    kept = torch.empty(shape, dtype=torch.float32, device=query.device)
    rows = max(1, _CHUNK_BYTES // max(1, num_heads * columns.shape[2] * dtype.itemsize))
    for first in range(0, length, rows):
        part = slice(first, first + rows)
        own_mask = mask if mask is None or mask.shape[1] == 1 else mask[:, part]
        own_lse = None if lse is None else lse[:, part].to(dtype)
        weights = _chunk(query[:, part].to(dtype), columns, call.scale, own_mask, own_lse)
        if lse is None and keys is not None:
            weights = weights.index_select(2, keys)
        kept[:, part] = weights.mean(dim=0, keepdim=True) if average else weights
    return kept


def _chunk(query: Tensor, columns: Tensor, scale: float, mask: Tensor | None, lse: Tensor | None) -> Tensor:
    """Weights of a few queries, [H, rows, Lk or T]."""
    if lse is not None:
        # Keys are few, so that they make the short side of the product; the log-sum-exp is taken off within it.
        scores = torch.baddbmm(lse.unsqueeze(1), columns.transpose(1, 2), query.transpose(1, 2), beta=-1, alpha=scale)
        scores = scores.transpose(1, 2)
    else:
        scores = torch.baddbmm(query.new_zeros(1, 1, 1), query, columns, beta=0, alpha=scale)
    if mask is None:
        return scores.exp_() if lse is not None else scores.softmax(dim=-1)
    if mask.dtype is torch.bool:
        scores = scores.masked_fill_(~mask, float("-inf"))
    else:
        scores = scores.add_(mask.detach().to(scores.dtype))
    # Without any key, a row of softmax is not a number.
    weights = scores.exp_() if lse is not None else scores.softmax(dim=-1)
    return weights.nan_to_num_(nan=0.0)
