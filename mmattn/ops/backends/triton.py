"""Our own Triton kernels for short keys (`mmattn.kernels.short_keys`): text, a few hundred image tokens.

Long-key kernels work in tiles of 128 keys and more, and give each to one program in the backward; these hold all keys
of a head, waste little on lengths like 77, and split over queries. docs/kernels.md has where that pays.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmattn.ops import masks
from mmattn.ops.limits import AutoShape, Backend, Limits
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
    is_per_key = attn_mask.shape[2] == 1 and attn_mask.shape[1] in (1, kv_heads)
    return key_mask, None if is_per_key else attn_mask


_MASKS = ("key", "boolean")
_HALF = (torch.bfloat16, torch.float16)
_HOPPER = ((9, 0),)
# Text of 77 tokens in U-Nets: the forward at least 1.2 times as fast as torch's best kernel, by the card's time, in
# bfloat16 (float16 has the same instructions). docs/kernels.md has the measurements.
_MEASURED = (
    AutoShape(_HOPPER, _HALF, (40,), keys=(65, 80), queries=(4096, 4096), heads=(16, 128)),
    AutoShape(_HOPPER, _HALF, (80,), keys=(65, 80), queries=(1024, 1024), heads=(16, 32)),
    AutoShape(_HOPPER, _HALF, (160,), keys=(65, 80), queries=(256, 256), heads=(16, 32)),
    AutoShape(_HOPPER, _HALF, (64,), keys=(65, 80), queries=(4096, 4096), heads=(20, 40)),
    AutoShape(_HOPPER, _HALF, (64,), keys=(65, 80), queries=(1024, 1024), heads=(40, 80)),
)
# Under a key mask sdpa first sets keys and values to zero, and its backward may not use cuDNN. Rows for `_MEASURED`, to
# be moved there when scripts/gpu/short_keys.py has measured them ("mmattn sdpa / ours" of 1.2 or more).
TO_MEASURE = (
    AutoShape(_HOPPER, _HALF, (72,), keys=(300, 300), queries=(4096, 4096), heads=(32, 64), with_key_mask=True),
    AutoShape(_HOPPER, _HALF, (40,), keys=(65, 80), queries=(4096, 4096), heads=(16, 128), with_key_mask=True),
    AutoShape(_HOPPER, _HALF, (64,), keys=(65, 80), queries=(4096, 4096), heads=(20, 40), with_key_mask=True),
)

BACKEND = Backend(
    name="triton",
    run=run,
    run_with_maps=run_with_maps,
    limits=Limits(
        # Triton's interpreter has no bfloat16.
        dtypes={"cuda": (torch.float32, *_HALF), "cpu": (torch.float32, torch.float16)},
        grad_devices=("cuda", "cpu"),
        masks={"cuda": _MASKS, "cpu": _MASKS},
        has_mask_grad=False,
        has_dropout=False,
        max_head_dim=160,
        max_keys=512,
    ),
    unusable=triton_missing,
    # ("cuda",) switches it on for the shapes above, when a call costs the processor no more than it saves the card.
    auto_devices=(),
    auto_note="the fastest on the card at some short keys, but what a call costs the processor was not measured since "
    "launches are remembered: name it where calls are replayed as a CUDA graph, or keep the card busy",
    auto_shapes=_MEASURED,
    packages=("torch", "triton"),
)
