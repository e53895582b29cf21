"""Our own Triton kernels for short keys (`mmattn.kernels.short_keys`): text, a few hundred image tokens.

Long-key kernels work in tiles of 128 keys and more, and give each to one program in the backward; these hold all keys
of a head, waste little on lengths like 77, and split over queries. docs/kernels.md has where that pays.
"""

from __future__ import annotations

import functools

import torch
from packaging.version import Version
from torch import Tensor

from mmattn._optional import package_version
from mmattn.ops import masks
from mmattn.ops.limits import AutoShape, Backend, Limits, torch_device_missing
from mmattn.ops.request import Request

_MIN_TRITON = "3.6"
_SHARED_BYTES = 163 * 1024


def run(request: Request) -> tuple[Tensor, None]:
    """Compute output [B, H, Lq, D]."""
    # Only here, because it needs triton.
    from mmattn.kernels.short_keys import short_key_attention

    key_mask, attn_mask = _masks(request)
    output, _ = short_key_attention(request.query, request.key, request.value, key_mask, attn_mask, request.scale)
    return output, None


def _masks(request: Request) -> tuple[Tensor | None, Tensor | None]:
    """(key mask [b, g, Lk], attn_mask [b, h, q, Lk]) of which the former holds all that does not depend on the query,
    and leaves out keys that no query of their row and head may attend to."""
    key_mask = None if request.key_mask is None else request.key_mask[:, None]
    attn_mask, kv_heads = request.attn_mask, request.key.shape[1]
    if attn_mask is None:
        return key_mask, None
    used = masks.used_keys(attn_mask, kv_heads).squeeze(-1)
    key_mask = masks.combine(key_mask, used)
    is_per_key = attn_mask.shape[2] == 1 and attn_mask.shape[1] in (1, kv_heads)
    return key_mask, None if is_per_key else attn_mask


@torch.compiler.assume_constant_result
def _unusable(device: str) -> str | None:
    return _probe(device)


@functools.cache
def _probe(device: str) -> str | None:
    version = package_version("triton")
    if version is None:
        return "needs the package triton: pip install 'mmattn[triton]'"
    if Version(version) < Version(_MIN_TRITON):
        return f"needs triton {_MIN_TRITON} or newer, {version} is installed"
    if device == "cpu":
        from mmattn.kernels.launch import is_interpreted

        return None if is_interpreted() else "needs a GPU (on a CPU only Triton's interpreter runs it, for tests)"
    missing = torch_device_missing(device)
    if missing is not None:
        return missing
    if torch.version.hip:
        return "written for NVIDIA GPUs, not tried on AMD"
    card = torch.cuda.get_device_properties(torch.cuda.current_device())
    if card.shared_memory_per_block_optin < _SHARED_BYTES:
        own = f"{card.name} has {card.shared_memory_per_block_optin // 1024} KiB"
        return f"needs {_SHARED_BYTES // 1024} KiB of shared memory a block (A100, H100 and newer), {own}"
    return None


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

BACKEND = Backend(
    name="triton",
    run=run,
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
    unusable=_unusable,
    # ("cuda",) switches it on for the shapes above, when a call costs the processor no more than it saves the card.
    auto_devices=(),
    auto_note="the fastest on the card at some short keys, but a call costs the processor 115 us, one of sdpa 29: "
    "name it where calls are replayed as a CUDA graph, or keep the card busy",
    auto_shapes=_MEASURED,
    packages=("torch", "triton"),
)
