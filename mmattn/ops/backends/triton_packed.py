"""Our own Triton kernels for packed short sequences (`mmattn.kernels.packed_rows`): sentences of some ten tokens.

Kernels for variable lengths give each sequence programs of its own, however short it is; these work on blocks of
neighbouring rows, whatever sequences they belong to. docs/kernels.md has where that pays.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmattn.ops.limits import HALVES, HOPPER, Backend, Limits, compute_capability
from mmattn.ops.request import Request
from mmattn.ops.segments import PackedRequest
from mmattn.ops.triton_missing import TENSOR_MEMORY, triton_missing
from mmattn.ops.unpadded import Rows, attend_unpadded

# "auto" leaves packed sequences of more keys than this on the average to kernels for long ones; 0 switches these off.
# Varlen's time goes with the number of sequences, that of these kernels hardly. Measured on an H200, heads of 64, in
# bfloat16: at 11 keys 9 times as fast as varlen forward and 11 times with the backward, at 64 keys 2.1 and 2.5 times,
# at 200 still 1.6 times. Elsewhere an estimate, and nothing where products go through tensor memory (capability 10 and
# 11, B200): such code has never run.
AUTO_PACKED_MEAN_KEYS = 48
AUTO_PACKED_MEAN_KEYS_MEASURED = 200


def run(request: Request) -> tuple[Tensor, None]:
    """Compute output [B, H, Lq, D]."""
    return attend_unpadded(request, _attend_rows)


def run_packed(request: PackedRequest) -> Tensor:
    """Compute output [N, H, D]."""
    # Only here, because it needs triton.
    from mmattn.kernels.packed_rows import attend

    queries, keys = request.query_segments, request.key_segments
    return attend(
        request.query,
        request.key,
        request.value,
        queries.cu_seqlens,
        keys.cu_seqlens,
        queries.row_numbers(),
        keys.row_numbers(),
        request.is_causal,
        request.scale,
    )


def _attend_rows(rows: Rows) -> Tensor:
    from mmattn.kernels.packed_rows import attend

    query_numbers, key_numbers = (
        torch.bucketize(
            torch.arange(tensor.shape[0], device=tensor.device, dtype=torch.int32),
            starts[1:],
            out_int32=True,
            right=True,
        )
        for tensor, starts in ((rows.query, rows.query_starts), (rows.key, rows.key_starts))
    )
    places = (rows.query_starts, rows.key_starts, query_numbers, key_numbers)
    return attend(rows.query, rows.key, rows.value, *places, rows.is_causal, rows.scale)


def _auto_mean_keys(request: PackedRequest) -> int:
    key = request.key
    capability = compute_capability(key.device) if key.is_cuda else None
    if capability is not None and capability[0] in TENSOR_MEMORY:
        return 0
    if capability in HOPPER and key.dtype in HALVES and key.shape[2] <= 64:
        return AUTO_PACKED_MEAN_KEYS_MEASURED
    return AUTO_PACKED_MEAN_KEYS


_MASKS = ("causal", "key")

BACKEND = Backend(
    name="triton_packed",
    run=run,
    run_packed=run_packed,
    limits=Limits(
        # Triton's interpreter has no bfloat16.
        dtypes={"cuda": (torch.float32, torch.bfloat16, torch.float16), "cpu": (torch.float32, torch.float16)},
        grad_devices=("cuda", "cpu"),
        masks={"cuda": _MASKS, "cpu": _MASKS},
        has_causal_key_mask=False,
        has_mask_grad=False,
        has_dropout=False,
        max_head_dim=160,
    ),
    unusable=triton_missing,
    auto_devices=(),
    auto_note="packed sequences that are short take it by themselves; padded calls, where padding is cut off first, "
    "only by its name",
    auto_packed_mean_keys=_auto_mean_keys,
    packages=("torch", "triton"),
)
