"""Our own Triton kernels for a few queries and many keys (`mmattn.kernels.decode`): a step of decoding.

Other kernels give all keys of a head to one program: with a query for each head most of a card has nothing to do. These
share out the keys, and query heads that have keys in common read them once. docs/kernels.md has where that pays.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from mmattn.ops.limits import HALVES, HOPPER, AutoShape, Backend, Limits
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
# On an H200 (docs/kernels.md): under a mask sdpa first sets keys and values that are not used to zero, all of them, and
# these kernels do not even read them; without one, several queries a head are what torch's kernels have no split for.
_MEASURED = functools.partial(
    AutoShape, HOPPER, HALVES, (64, 80, 128), (1, 1 << 20), heads=(1, 1 << 20), with_grad=False
)
_FEW = tuple(range(1, 9))
_MASKED = (
    _MEASURED(queries=_FEW, with_key_mask=True, attn_masks=("none", "boolean")),
    _MEASURED(queries=_FEW, with_key_mask=False, attn_masks=("boolean",)),
)
_REPLAYED = (_MEASURED(queries=_FEW[1:], when_replayed_only=True),)

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
    auto_devices=("cuda",),
    auto_note="steps of decoding under a mask, or of several queries, on an H100 or H200 (docs/kernels.md)",
    auto_shapes=(*_MASKED, *_REPLAYED),
    packages=("torch", "triton"),
)
