"""The package flash-attn (arXiv 2307.08691); beyond torch's own attention of packed sequences it knows dropout.

A padded call is unpadded by its key mask on the device first, so padding is never computed with.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from mmattn._optional import package_version, require
from mmattn.ops.limits import HALVES, Backend, Limits, ampere_missing
from mmattn.ops.request import Request
from mmattn.ops.segments import PackedRequest
from mmattn.ops.unpadded import Rows, attend_unpadded, packed_rows


def run(request: Request) -> tuple[Tensor, None]:
    """Compute output [B, H, Lq, D]."""
    return attend_unpadded(request, _attend)


def run_packed(request: PackedRequest) -> Tensor:
    """Compute output [N, H, D]."""
    return _attend(packed_rows(request))


def _attend(rows: Rows) -> Tensor:
    flash_attn = require("flash_attn", "attention backend 'flash'")
    output = flash_attn.flash_attn_varlen_func(
        rows.query,
        rows.key,
        rows.value,
        rows.query_starts,
        rows.key_starts,
        rows.max_queries,
        rows.max_keys,
        dropout_p=rows.dropout_p,
        softmax_scale=rows.scale,
        causal=rows.is_causal,
    )
    return cast(Tensor, output)


@torch.compiler.assume_constant_result
def _unusable(device: str) -> str | None:
    if package_version("flash-attn") is None:
        return "needs the package flash-attn: pip install flash-attn"
    return ampere_missing(device)


BACKEND = Backend(
    name="flash",
    run=run,
    run_packed=run_packed,
    limits=Limits(
        dtypes={"cuda": HALVES},
        grad_devices=("cuda",),
        masks={"cuda": ("causal", "key")},
        has_causal_key_mask=False,
        has_mask_grad=False,
        min_head_dim=8,
        max_head_dim=256,
        head_dim_step=8,
    ),
    unusable=_unusable,
    auto_devices=(),
    auto_note="packed sequences with dropout take it by themselves; padded calls, where padding is cut off first, only "
    "by its name",
    packages=("torch", "flash-attn"),
)
