"""Our own Triton kernels for short keys (`mmattn.kernels.short_keys`): text, a few hundred image tokens.

Long-key kernels work in tiles of 128 keys and more, and give each to one program in the backward; these hold all keys
of a head, waste little on lengths like 77, and split over queries. docs/kernels.md has where that pays.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmattn.ops import masks
from mmattn.ops.limits import HALVES, HOPPER, AutoShape, Backend, Limits
from mmattn.ops.request import Request
from mmattn.ops.same_pass import MapsAsked, SamePassMaps
from mmattn.ops.triton_missing import triton_missing


def run(request: Request) -> tuple[Tensor, None]:
    """Compute output [B, H, Lq, D]."""
    # Only here, because it needs triton.
    from mmattn.kernels.short_keys import attend

    key_mask, attn_mask = _masks(request)
    return attend(request.query, request.key, request.value, key_mask, attn_mask, request.scale), None


def run_with_maps(request: Request, asked: MapsAsked) -> tuple[Tensor, SamePassMaps]:
    """Compute output [B, H, Lq, D], and the weights that are asked for."""
    from mmattn.kernels.short_keys_maps import short_key_attention_maps

    keys, first_row = asked.table(request)
    output, lse, weights = short_key_attention_maps(
        request.query,
        request.key,
        request.value,
        *_masks(request),
        request.scale,
        keys,
        first_row,
        None if asked.heads is None else list(asked.heads),
        asked.average,
    )
    return output, SamePassMaps(asked, weights, lse)


def _masks(request: Request) -> tuple[Tensor | None, Tensor | None]:
    """(key mask [b, g, Lk], attn_mask [b, h, q, Lk]) of which the former holds all that does not depend on the query,
    and leaves out keys that no query of their row and head may attend to."""
    key_mask = None if request.key_mask is None else request.key_mask.unsqueeze(1)
    attn_mask, kv_heads = request.attn_mask, request.key.shape[1]
    if attn_mask is None:
        return key_mask, None
    used = masks.used_keys(attn_mask, kv_heads).squeeze(-1)
    key_mask = masks.combine(key_mask, used)
    is_per_key = attn_mask.shape[2] == 1 and (attn_mask.shape[1] == 1 or attn_mask.shape[1] == kv_heads)
    return key_mask, None if is_per_key else attn_mask


_MASKS = ("key", "boolean")
# U-Nets and PixArt in bfloat16 (float16 has the same instructions); docs/kernels.md has the measurements. Ranges of
# keys: what the kernels cut as they do 77 and 300, or shorter, but as many blocks of 64 or 128 in torch's kernels.
_TEXT = (65, 80)
_LONG_TEXT = (257, 304)
# Under a key mask sdpa first sets keys and values to zero, and its backward may not use cuDNN: by the wall clock calls
# one after another are 1.2 times as fast here with gradients and 2 to 3 times without, at batch 2. Larger batches only
# add to the card's time, by which it is 1.3 to 4 times without gradients and 3 to 16 with them.
_MASKED = (
    AutoShape(HOPPER, HALVES, (40,), _TEXT, queries=(4096,), heads=(16, 1024), with_key_mask=True),
    AutoShape(HOPPER, HALVES, (64,), _TEXT, queries=(4096,), heads=(20, 1280), with_key_mask=True),
    AutoShape(HOPPER, HALVES, (72,), _LONG_TEXT, queries=(4096,), heads=(32, 2048), with_key_mask=True),
)
# Without a mask a call costs the processor more than sdpa's does: one after another they pay where the card has more
# to do than that, and more to do than in torch's best kernel.
_LARGE = (
    AutoShape(HOPPER, HALVES, (40,), _TEXT, queries=(4096,), heads=(128, 1024), with_grad=False),
    AutoShape(HOPPER, HALVES, (64,), _TEXT, queries=(4096,), heads=(160, 1280)),
)
# Replayed, all that are at least 1.2 times as fast as torch's best kernel.
_REPLAYED = (
    AutoShape(HOPPER, HALVES, (40,), _TEXT, queries=(4096,), heads=(16, 128), when_replayed_only=True),
    AutoShape(HOPPER, HALVES, (80,), _TEXT, queries=(1024,), heads=(16, 32), when_replayed_only=True),
    AutoShape(HOPPER, HALVES, (160,), _TEXT, queries=(256,), heads=(16, 128), when_replayed_only=True),
    AutoShape(HOPPER, HALVES, (64,), _TEXT, queries=(4096,), heads=(20, 160), when_replayed_only=True),
    AutoShape(HOPPER, HALVES, (64,), _TEXT, queries=(1024,), heads=(40, 320), when_replayed_only=True),
)

BACKEND = Backend(
    name="triton",
    run=run,
    run_with_maps=run_with_maps,
    limits=Limits(
        # Triton's interpreter has no bfloat16.
        dtypes={"cuda": (torch.float32, *HALVES), "cpu": (torch.float32, torch.float16)},
        grad_devices=("cuda", "cpu"),
        masks={"cuda": _MASKS, "cpu": _MASKS},
        has_mask_grad=False,
        has_dropout=False,
        max_head_dim=160,
        max_keys=512,
    ),
    unusable=triton_missing,
    auto_devices=("cuda",),
    auto_note="text of 65 to 80 keys in U-Nets, under a key mask up to 304, on an H100 or H200 (docs/kernels.md)",
    auto_shapes=(*_MASKED, *_LARGE, *_REPLAYED),
    packages=("torch", "triton"),
)
