"""The package flash-attn (arXiv 2307.08691) for packed sequences; beyond torch's own it knows dropout."""

from __future__ import annotations

import functools
from typing import cast

import torch
from torch import Tensor

from mmattn._optional import package_version, require
from mmattn.ops.limits import Limits, ampere_missing
from mmattn.ops.segments import PackedRequest

LIMITS = Limits(
    dtypes={"cuda": (torch.bfloat16, torch.float16)},
    grad_devices=("cuda",),
    masks={"cuda": ("causal",)},
    min_head_dim=8,
    max_head_dim=256,
    head_dim_step=8,
)


def run(request: PackedRequest) -> Tensor:
    """Compute output [N, H, D]."""
    flash_attn = require("flash_attn", "attention backend 'flash'")
    queries, keys = request.query_segments, request.key_segments
    output = flash_attn.flash_attn_varlen_func(
        request.query,
        request.key,
        request.value,
        queries.cu_seqlens,
        keys.cu_seqlens,
        queries.longest,
        keys.longest,
        dropout_p=request.dropout_p,
        softmax_scale=request.scale,
        causal=request.is_causal,
    )
    return cast(Tensor, output)


@functools.cache
def unusable(device: str) -> str | None:
    """Why it cannot be used here; None when it can."""
    if package_version("flash-attn") is None:
        return "needs the package flash-attn: pip install flash-attn"
    return ampere_missing(device)
