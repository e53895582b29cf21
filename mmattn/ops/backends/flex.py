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
from mmattn.ops.limits import Backend, KnownBad, Limits, torch_device_missing
from mmattn.ops.request import Request

_HALF_AND_SINGLE = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def _compiled(*, is_dynamic: bool) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """(flex_attention, create_block_mask), imported and compiled by the first call that needs them."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    return torch.compile(flex_attention, dynamic=is_dynamic), create_block_mask


def run(request: Request) -> tuple[Tensor, None]:
    """Compute output [B, H, Lq, D]."""
    query, key, value = request.query, request.key, request.value
    batch, heads, num_queries, _ = query.shape
    num_keys = key.shape[2]
    if query.numel() == 0 or num_keys == 0:
        return masks.nothing_for(query, key, request.value, request.attn_mask), None
    # Of sizes that vary the C++ for a CPU mixes names up (`_CPU_SIZES`), of fixed ones not: one compilation for each
    # length, after eight of which torch says that it compiles no more.
    is_dynamic = query.device.type != "cpu" or request.key_mask is None
    flex_attention, create_block_mask = _compiled(is_dynamic=is_dynamic)
    if query is key or query is value or key is value:
        # Of one tensor in two places neither the kernel for CPUs (torch 2.11) nor who says why something is compiled
        # again can make anything.
        query, key, value = (tensor.view_as(tensor) for tensor in (query, key, value))
    mask_mod, bias = None, None
    if request.attn_mask is not None:
        causal = masks.causal_mask(num_queries, num_keys, device=query.device) if request.is_causal else None
        key_mask = None if request.key_mask is None else request.key_mask[:, None, None, :]
        allowed, bias = masks.split_bias(request.attn_mask)
        allowed = masks.combine(allowed, key_mask, causal)
        assert allowed is not None  # there is an attn_mask
        key, value = masks.zero_unused(key, value, allowed)
        mask_mod = _by_table(allowed.expand(batch, heads, num_queries, num_keys).contiguous())
    elif request.key_mask is not None or request.is_causal:
        # The last query of a causal mask sees every key: only the key mask can leave a key unused.
        if request.key_mask is not None:
            key, value = masks.zero_unused(key, value, request.key_mask[:, None, None, :])
        offset = torch.tensor(num_keys - num_queries, device=query.device) if request.is_causal else None
        mask_mod = _by_position(request.key_mask, offset)
    block_mask = None
    if mask_mod is not None:
        block_mask = create_block_mask(mask_mod, batch, heads, num_queries, num_keys, device=query.device)
    score_mod = None
    if bias is not None:
        score_mod = _adding(masks.in_dtype(bias, query.dtype).expand(batch, heads, num_queries, num_keys).contiguous())
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


def _by_position(key_mask: Tensor | None, offset: Tensor | None) -> Callable[..., Tensor]:
    if key_mask is None:
        return lambda b, h, query, key: key <= query + offset
    if offset is None:
        return lambda b, h, query, key: key_mask[b, key]
    return lambda b, h, query, key: key_mask[b, key] & (key <= query + offset)


def _by_table(allowed: Tensor) -> Callable[..., Tensor]:
    return lambda b, h, query, key: allowed[b, h, query, key]


def _adding(bias: Tensor) -> Callable[..., Tensor]:
    return lambda score, b, h, query, key: score + bias[b, h, query, key]


@torch.compiler.assume_constant_result
def _unusable(device: str) -> str | None:
    return _probe(device)


@functools.cache
def _probe(device: str) -> str | None:
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


_CPU_TABLES = KnownBad(
    what="FlexAttention compiled for a CPU with a mask or bias read from a [B, H, Lq, Lk] table (torch 2.13)",
    effect="the C++ that it generates does not compile",
    action="boolean and float masks are refused on a CPU",
    reference="tests/ops/test_flex.py",
)

_CPU_SIZES = KnownBad(
    what="FlexAttention compiled for a CPU, for sizes that vary, with a mask that is a tensor (torch 2.11, 2.13)",
    effect="in the C++ that it generates, the name of one size is replaced within that of another: it does not compile",
    action="key masks on a CPU are compiled for each length by itself",
    reference="tests/ops/test_flex.py",
)

BACKEND = Backend(
    name="flex",
    run=run,
    limits=Limits(
        dtypes={"cpu": _HALF_AND_SINGLE, "cuda": _HALF_AND_SINGLE},
        grad_devices=("cuda",),
        masks={"cpu": ("causal", "key")},
        has_mask_grad=False,
        has_dropout=False,
    ),
    unusable=_unusable,
    auto_devices=(),
    auto_note="compiles for each new kind of call, and slower than sdpa where measured",
    known_bad=(_CPU_TABLES, _CPU_SIZES),
    packages=("torch", "triton"),
)
