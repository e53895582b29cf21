"""The attention call that every swapped layer makes: `mmattn.attention`, or, within `verify`, its reference.

Shapes: B batch, H query heads, G key/value heads, Lq / Lk lengths, D head_dim.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.overrides import _get_current_function_mode_stack

from mmattn.ops.attention import attention

REFERENCES = ("eager", "float64")
_REFERENCE: ContextVar[str | None] = ContextVar("mmattn_swap_reference", default=None)


@contextlib.contextmanager
def computing_reference(kind: str) -> Iterator[None]:
    """Within the block, swapped layers compute attention by the specification: "eager" in their own dtype, or in
    "float64", rounded to their dtype at the end. Everything around attention stays as it is."""
    assert kind in REFERENCES
    token = _REFERENCE.set(kind)
    try:
        yield
    finally:
        _REFERENCE.reset(token)


def reference_kind() -> str | None:
    """What `computing_reference` has set here; compiled code never sees one."""
    return None if torch.compiler.is_compiling() else _REFERENCE.get()


def _is_perturbed() -> bool:
    """Whether a hook of diffusers (perturbed-attention guidance of guiders, skipped layers) waits for torch's fused
    attention, to give something else in its place: no other backend may pass it by."""
    if torch.compiler.is_compiling():
        return False
    return any(type(mode).__name__ == "AttentionScoreSkipFunctionMode" for mode in _get_current_function_mode_stack())


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    role: str | None,
    backend: str = "auto",
    attn_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    caller: Any = None,
) -> Tensor:
    """`mmattn.attention` with the arguments of the same names: [B, H, Lq, D], in the query's dtype."""
    arguments: dict[str, Any] = {
        "key_mask": key_mask,
        "is_causal": is_causal,
        "scale": scale,
        "dropout_p": dropout_p,
        "role": role,
        "caller": caller,
    }
    reference = reference_kind()
    if reference is None:
        backend = "sdpa" if _is_perturbed() else backend
        return attention(query, key, value, attn_mask=attn_mask, backend=backend, **arguments)
    if reference == "eager":
        return attention(query, key, value, attn_mask=attn_mask, backend="eager", **arguments)
    if attn_mask is not None and attn_mask.is_floating_point():
        attn_mask = attn_mask.double()
    with torch.autocast(query.device.type, enabled=False):
        output = attention(
            query.double(), key.double(), value.double(), attn_mask=attn_mask, backend="eager", **arguments
        )
    return output.to(query.dtype)
