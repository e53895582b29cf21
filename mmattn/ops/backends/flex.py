"""torch's FlexAttention (arXiv 2412.05496): masks as predicates, compiled into one kernel on first use.

Worth naming where a kernel with masks is wanted on CUDA. On a CPU it is 0.04 to 0.8 times as fast as sdpa and has no
backward, so "auto" does not choose it.
"""

from __future__ import annotations

import functools
import platform
import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mmattn._optional import package_version
from mmattn.ops import masks
from mmattn.ops.limits import Backend, Limits, torch_device_missing
from mmattn.ops.request import Request

_HALF_AND_SINGLE = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def _compiled() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """(flex_attention, create_block_mask), imported and compiled by the first call that needs them."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    return torch.compile(flex_attention, dynamic=True), create_block_mask


def run(request: Request) -> tuple[Tensor, None]:
    """Compute output [B, H, Lq, D]."""
    query, key, value = request.query, request.key, request.value
    batch, heads, num_queries, _ = query.shape
    num_keys = key.shape[2]
    if query.numel() == 0 or num_keys == 0:
        # Nothing to compile for: zeros, on which a backward still finds the query and gives it zeros.
        return query.masked_fill(torch.ones((), dtype=torch.bool, device=query.device), 0.0), None
    flex_attention, create_block_mask = _compiled()
    allowed, bias = masks.split_bias(request.attn_mask)
    key_mask = request.key_mask
    if key_mask is not None and allowed is None and not request.is_causal:
        key, value = masks.zero_unused(key, value, key_mask[:, None, None, :])
        mask_mod = _by_key(key_mask)
    elif key_mask is not None or allowed is not None:
        causal = None
        if request.is_causal:
            causal = masks.causal_mask(num_queries, num_keys, device=query.device)[None, None]
        allowed = masks.combine(allowed, None if key_mask is None else key_mask[:, None, None, :], causal)
        assert allowed is not None  # one of the masks is there
        key, value = masks.zero_unused(key, value, allowed)
        mask_mod = _by_table(allowed.expand(batch, heads, num_queries, num_keys).contiguous())
    elif request.is_causal:
        mask_mod = _by_offset(torch.tensor(num_keys - num_queries, device=query.device))
    else:
        mask_mod = None
    block_mask = None
    if mask_mod is not None:
        block_mask = create_block_mask(mask_mod, batch, heads, num_queries, num_keys, device=query.device)
    score_mod = None
    if bias is not None:
        score_mod = _adding(bias.to(query.dtype).expand(batch, heads, num_queries, num_keys).contiguous())
    output = flex_attention(
        query,
        key,
        value,
        score_mod=score_mod,
        block_mask=block_mask,
        scale=request.scale,
        enable_gqa=heads != key.shape[1],
    )
    return output, None


def _by_key(key_mask: Tensor) -> Callable[..., Tensor]:
    return lambda b, h, query, key: key_mask[b, key]


def _by_table(allowed: Tensor) -> Callable[..., Tensor]:
    return lambda b, h, query, key: allowed[b, h, query, key]


def _by_offset(offset: Tensor) -> Callable[..., Tensor]:
    return lambda b, h, query, key: key <= query + offset


def _adding(bias: Tensor) -> Callable[..., Tensor]:
    return lambda score, b, h, query, key: score + bias[b, h, query, key]


@functools.cache
def _unusable(device: str) -> str | None:
    missing = torch_device_missing(device)
    if missing is not None:
        return missing
    if device == "cuda":
        return None if package_version("triton") else "needs the package triton"
    if not any(map(shutil.which, ("c++", "g++", "clang++", "cl"))):
        return "needs a C++ compiler on the path"
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX") or platform.system() == "Darwin":
        return "needs a processor with AVX2, and not macOS"
    return None


BACKEND = Backend(
    name="flex",
    run=run,
    limits=Limits(
        dtypes={"cpu": _HALF_AND_SINGLE, "cuda": _HALF_AND_SINGLE},
        grad_devices=("cuda",),
        has_mask_grad=False,
        has_dropout=False,
    ),
    unusable=_unusable,
    auto_devices=(),
    auto_note="compiles for each new kind of call, and slower than sdpa where measured",
    packages=("torch", "triton"),
)
