"""torch's own attention of packed sequences (`torch.nn.attention.varlen`): FlashAttention-2 without the package.

A padded call is unpadded by its key mask on the device first, so padding is never computed with.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mmattn.ops.limits import HALVES, HOPPER, AutoShape, Backend, Limits, ampere_missing
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
    # Only here: it registers operators when it is imported.
    from torch.nn.attention.varlen import varlen_attn

    options: dict[str, Any] = {}
    if rows.query.shape[1] != rows.key.shape[1] and _has_flag_for_groups():
        options["enable_gqa"] = True
    output = varlen_attn(
        rows.query,
        rows.key,
        rows.value,
        rows.query_starts,
        rows.key_starts,
        rows.max_queries,
        rows.max_keys,
        scale=rows.scale,
        window_size=(-1, 0) if rows.is_causal else (-1, -1),
        **options,
    )
    assert isinstance(output, Tensor)  # nothing else was asked for
    return output


@torch.compiler.assume_constant_result
def _has_flag_for_groups() -> bool:
    """torch 2.11 serves grouped heads without being told; from 2.12 on they need a flag."""
    from torch.nn.attention.varlen import varlen_attn

    return _takes_flag(varlen_attn)


@functools.lru_cache(maxsize=4)
def _takes_flag(function: Callable[..., Any]) -> bool:
    return "enable_gqa" in inspect.signature(function).parameters


_PIXART, _LONG_TEXT = (257, 304), (449, 512)
# On an H200, with texts of up to 120 of 300 and 128 of 512 keys, and of up to all (docs/kernels.md): 1.04 to 1.45 times
# as fast as triton, and 2.6 to 3.5 times as fast as sdpa. Cutting padding off costs the processor 350 to 600 us, for
# which the card has to be busy.
_PADDED = (
    AutoShape(HOPPER, HALVES, (72,), _PIXART, (4096,), (64, 2048), with_key_mask=True, when_replayed_only=True),
    AutoShape(HOPPER, HALVES, (72,), _PIXART, (4096,), (256, 2048), with_key_mask=True, with_grad=True),
    AutoShape(HOPPER, HALVES, (128,), _LONG_TEXT, (4096,), (48, 1536), with_key_mask=True, with_grad=True),
)

BACKEND = Backend(
    name="varlen",
    run=run,
    run_packed=run_packed,
    limits=Limits(
        dtypes={"cuda": HALVES},
        grad_devices=("cuda",),
        masks={"cuda": ("causal", "key")},
        has_causal_key_mask=False,
        has_mask_grad=False,
        has_dropout=False,
        min_head_dim=8,
        max_head_dim=256,
        head_dim_step=8,
    ),
    unusable=ampere_missing,
    auto_devices=("cuda",),
    auto_note="packed sequences take it by themselves; padded calls, where padding is cut off first, in training with "
    "hundreds of keys on an H100 or H200 (docs/kernels.md)",
    auto_shapes=_PADDED,
)
