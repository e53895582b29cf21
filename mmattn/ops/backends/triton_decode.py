"""Our own Triton kernels for a few queries and many keys (`mmattn.kernels.decode`): a step of decoding.

Other kernels give all keys of a head to one program: with a query for each head most of a card has nothing to do. These
share out the keys, and query heads that have keys in common read them once. docs/kernels.md has where that pays.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmattn.ops.limits import Backend, Limits
from mmattn.ops.request import Request
from mmattn.ops.triton_missing import triton_missing


def run(request: Request) -> tuple[Tensor, None]:
    """Compute output [B, H, Lq, D]."""
    # Only here, because it needs triton.
    from mmattn.kernels.decode import attend

    query, key, value, is_causal = request.query, request.key, request.value, request.is_causal
    key_mask, attn_mask = _masks(request)
    return attend(query, key, value, key_mask, attn_mask, is_causal, request.scale), None


def _masks(request: Request) -> tuple[Tensor | None, Tensor | None]:
    """(key mask [b, g, Lk], attn_mask [b, h, q, Lk]). A mask that is the same for all queries of a key/value head, of
    which there is one a place in a static cache, is a key mask: read once for all of them."""
    key_mask = None if request.key_mask is None else request.key_mask[:, None]
    attn_mask = request.attn_mask
    if key_mask is None and attn_mask is not None:
        _, mask_heads, mask_queries, _ = attn_mask.shape
        if mask_queries == 1 and (mask_heads == 1 or mask_heads == request.key.shape[1]):
            return attn_mask.squeeze(2), None
    return key_mask, attn_mask


_MASKS = ("causal", "key", "boolean")

BACKEND = Backend(
    name="triton_decode",
    run=run,
    limits=Limits(
        # Triton's interpreter has no bfloat16.
        dtypes={"cuda": (torch.float32, torch.bfloat16, torch.float16), "cpu": (torch.float32, torch.float16)},
        grad_devices=(),
        masks={"cuda": _MASKS, "cpu": _MASKS},
        has_mask_grad=False,
        has_dropout=False,
        max_head_dim=160,
        max_queries=16,
    ),
    unusable=triton_missing,
    auto_devices=(),
    auto_note="for steps of decoding over some hundred keys and more: name it there",
    packages=("torch", "triton"),
)
