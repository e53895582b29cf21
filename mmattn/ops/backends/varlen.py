"""torch's own attention of packed sequences (`torch.nn.attention.varlen`): FlashAttention-2 without the package."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from mmattn.ops.limits import Limits, ampere_missing
from mmattn.ops.segments import PackedRequest

LIMITS = Limits(
    dtypes={"cuda": (torch.bfloat16, torch.float16)},
    grad_devices=("cuda",),
    masks={"cuda": ("causal",)},
    has_dropout=False,
    min_head_dim=8,
    max_head_dim=256,
    head_dim_step=8,
)


def run(request: PackedRequest) -> Tensor:
    """Compute output [N, H, D]."""
    # Only here: it registers operators when it is imported.
    from torch.nn.attention.varlen import varlen_attn

    queries, keys = request.query_segments, request.key_segments
    output = varlen_attn(
        request.query,
        request.key,
        request.value,
        queries.cu_seqlens,
        keys.cu_seqlens,
        queries.longest,
        keys.longest,
        scale=request.scale,
        window_size=(-1, 0) if request.is_causal else (-1, -1),
        enable_gqa=request.query.shape[1] != request.key.shape[1],
    )
    assert isinstance(output, Tensor)  # nothing else was asked for
    return output


@functools.cache
def unusable(device: str) -> str | None:
    """Why it cannot be used here; None when it can."""
    return ampere_missing(device)
