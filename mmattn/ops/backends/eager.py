"""The specification: attention written out in plain products. Every other backend is held to it in float64.

    weights = softmax(scale * query @ key^T + bias) over the keys that a row may attend to
    output  = weights @ value

Half types are computed in float32 and rounded once at the end. Serves every mask, gradients, and the weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmattn.ops import masks
from mmattn.ops.limits import FLOATS, Backend, Limits, torch_device_missing
from mmattn.ops.request import Request


def run(request: Request) -> tuple[Tensor, Tensor | None]:
    """Compute output [B, H, Lq, D] and, when asked for, weights [B, H, Lq, Lk]; both in the query's dtype."""
    with torch.autocast(request.query.device.type, enabled=False):
        output, weights = _attend(request)
    dtype = request.query.dtype
    return output.to(dtype), weights.to(dtype) if request.return_weights else None


def _attend(request: Request) -> tuple[Tensor, Tensor]:
    query = request.query
    batch, heads, num_queries, head_dim = query.shape
    kv_heads, num_keys = request.key.shape[1:3]
    group = heads // kv_heads if kv_heads else 1
    accumulate = torch.promote_types(query.dtype, torch.float32)
    query, key, value = (t.to(accumulate) for t in (query, request.key, request.value))

    causal = masks.causal_mask(num_queries, num_keys, device=query.device) if request.is_causal else None
    key_mask = None if request.key_mask is None else request.key_mask[:, None, None, :]
    allowed, bias = masks.split_bias(request.attn_mask)
    allowed = masks.combine(allowed, key_mask, causal)
    if allowed is not None:
        if allowed.dim() == 2:
            allowed = allowed[None, None]
        key, value = masks.zero_unused(key, value, allowed)

    # Query heads h = g * group + r share key/value head g: the group is an axis that keys and values broadcast over.
    grouped = (query * request.scale).reshape(batch, kv_heads, group, num_queries, head_dim)
    scores = (grouped @ key.unsqueeze(2).transpose(-1, -2)).reshape(batch, heads, num_queries, num_keys)
    if bias is not None:
        scores = scores + masks.in_dtype(bias, accumulate)
    if allowed is None:
        weights = scores.softmax(dim=-1)
    else:
        # A row without keys is made harmless before the softmax: afterwards its NaN would live on in the gradients.
        safe = allowed | masks.empty_rows(allowed)
        weights = scores.masked_fill(~safe, float("-inf")).softmax(dim=-1).masked_fill(~allowed, 0.0)
    dropped = torch.dropout(weights, request.dropout_p, train=True) if request.dropout_p else weights
    grouped_weights = dropped.reshape(batch, kv_heads, group, num_queries, num_keys)
    output = (grouped_weights @ value.unsqueeze(2)).reshape(batch, heads, num_queries, head_dim)
    return output, weights


BACKEND = Backend(
    name="eager",
    run=run,
    limits=Limits(
        dtypes={"cpu": FLOATS, "cuda": FLOATS},
        grad_devices=("cpu", "cuda"),
        has_weights=True,
        has_any_derivative=True,
    ),
    unusable=torch_device_missing,
    auto_devices=("cpu", "cuda"),
)
