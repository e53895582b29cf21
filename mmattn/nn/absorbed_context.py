"""Cross-attention of few queries to a long context, without keys and values.

The scores of a head are q (X Wk)^T = (q Wk^T) X^T, and its output is p (X Wv) = (p X) Wv: with the projections moved
to the side of the queries ("absorbed", arXiv 2405.04434, section 2.1, which does it for decoding), a context X is
attended to as it is. Where a short text looks at a picture of some hundred places this is a fraction of the work,
forward and backward, and a training step keeps no keys and values for its backward.

Shapes: B contexts of Lk rows and Cc channels, N packed queries, at most n of one context, H query heads, G key/value
heads, D head_dim.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor, nn

from mmattn.kernels.plain import makes_fake_tensors
from mmattn.nn.packed_linears import packing_refusals
from mmattn.ops.packed_groups import Side, padded, side_of
from mmattn.ops.segments import Segments

# At most this share of the ordinary way's multiplications, and at least so many rows of a context: below and beyond, it
# was no faster in every shape tried (docs/lab-notes.md). With channels of twice the head's size or more the first also
# bounds the scores, which are kept for the backward pass: at most two thirds of D queries for G = H.
_SHARE = 0.5
_FEWEST_ROWS = 64


def is_less_work(
    queries: Segments, contexts: Segments, num_heads: int, num_kv_heads: int, head_dim: int, width: int
) -> bool:
    """Are all contexts equally long, and long, and are there clearly fewer multiplications without keys and values?

    Args:
        queries: those of each context.
        contexts: their rows.
        num_heads: H.
        num_kv_heads: G.
        head_dim: D.
        width: Cc.
    """
    if contexts.longest * len(contexts) != contexts.total or contexts.longest < _FEWEST_ROWS or width < 2 * head_dim:
        return False
    slots = len(queries) * queries.longest
    ordinary = contexts.total * num_kv_heads * head_dim * width + slots * contexts.longest * num_heads * head_dim
    absorbed = slots * num_heads * head_dim * width + slots * contexts.longest * num_heads * width
    return absorbed <= _SHARE * ordinary


def can_absorb(key: nn.Module, value: nn.Module, query: Tensor, context: Tensor) -> bool:
    """Are the projections nothing but their weights, and was a call of this kind measured (float32 or float64 on a
    CPU)?"""
    if query.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return False
    if query.dtype not in (torch.float32, torch.float64) or context.dtype != query.dtype:
        return False
    return not packing_refusals({"key": key, "value": value})


def attend_absorbed(
    query: Tensor,
    context: Tensor,
    key: nn.Linear,
    value: nn.Linear,
    queries: Segments,
    num_kv_heads: int,
    scale: float | None = None,
) -> Tensor:
    """What attention gives, before the output projection, for packed queries and contexts of equal length.

    Args:
        query: [N, H, D].
        context: [B, Lk, Cc].
        key: the projection of keys, weight [G * D, Cc].
        value: the projection of values, weight [G * D, Cc].
        queries: B sequences of queries.
        num_kv_heads: G.
        scale: factor of the scores; 1 / sqrt(D) by default.

    Returns:
        [N, H, D].
    """
    batch, (_, heads, head_dim), groups = context.shape[0], query.shape, num_kv_heads
    side = (_side.__wrapped__ if makes_fake_tensors() else _side)(queries.lengths, query.device)
    sizes = (groups, heads // groups, batch, side.longest)
    query = padded(query * (1.0 / math.sqrt(head_dim) if scale is None else scale), batch, side)  # [B, H, n, D]
    by_head = query.unflatten(1, (groups, -1)).permute(1, 2, 0, 3, 4).flatten(1, 3)  # [G, H/G * B * n, D]
    absorbed = _by_context(by_head @ key.weight.unflatten(0, (groups, head_dim)), sizes)
    if key.bias is None:
        scores = absorbed @ context.mT
    else:
        # The same for all keys of a query, so it changes no weight: but the bias belongs to the graph as ever.
        own = _by_context(by_head @ key.bias.view(groups, head_dim, 1), sizes)
        scores = torch.baddbmm(own, absorbed, context.mT)
    seen = scores.softmax(-1) @ context  # [B, H * n, Cc]
    seen = seen.unflatten(1, (groups, sizes[1], -1)).permute(1, 2, 0, 3, 4).flatten(1, 3)
    output = seen @ value.weight.unflatten(0, (groups, head_dim)).mT  # [G, H/G * B * n, D]
    if value.bias is not None:
        output = output + value.bias.view(groups, 1, head_dim)  # weights sum to 1
    output = output.unflatten(1, (sizes[1], -1)).permute(2, 0, 1, 3).flatten(1, 2)  # [B * n, H, D]
    return output if side.rows is None else output.index_select(0, side.rows)


def _by_context(rows: Tensor, sizes: tuple[int, int, int, int]) -> Tensor:
    """`[G, H/G * B * n, X]` as `[B, H * n, X]`."""
    return rows.unflatten(1, sizes[1:]).permute(2, 0, 1, 3, 4).flatten(1, 3)


@functools.lru_cache(maxsize=16)
def _side(lengths: tuple[int, ...], device: torch.device) -> Side:
    # A tensor made in inference mode, and remembered, could not be saved for a later backward pass.
    with torch.inference_mode(False):
        return side_of(lengths, device)
