"""Attention of packed sequences: no padding, block-diagonal over the sequences.

Shapes: N rows of all queries, M of all keys, H query heads, G key/value heads, D head_dim.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mmattn.errors import UsageError
from mmattn.kernels.plain import wants_any_derivative
from mmattn.ops.observe import OBSERVERS
from mmattn.ops.packed_groups import attend_groups
from mmattn.ops.registry import check_role, choose_packed, selected
from mmattn.ops.request import Traits, cast_to_autocast, check_dropout, check_scale, check_tensors
from mmattn.ops.segments import PackedRequest, Segments, check_segments


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_segments: Segments,
    key_segments: Segments | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    backend: str = "auto",
    role: str | None = None,
    caller: Any = None,
) -> Tensor:
    """`mmattn.attention` of each sequence's queries to the keys of the sequence of the same number.

    On a GPU a kernel for variable lengths serves it where one can. Elsewhere, and where an ordinary backend is named,
    neighbouring sequences of like length share a call of `mmattn.attention`, padded only in there.

    Args:
        query: [N, H, D].
        key: [M, G, D]; H is a multiple of G, as in `mmattn.attention`.
        value: [M, G, D].
        query_segments: the sequences of the queries.
        key_segments: as many, of the keys; None where they are those of the queries.
        is_causal: query i of a sequence may attend to its keys j <= i + Lk - Lq.
        scale: factor of the scores; 1 / sqrt(D) by default.
        dropout_p: probability of dropping a weight, applied whenever it is not 0.
        backend: as in `mmattn.attention`; "triton_packed", "varlen" and "flash" know packed sequences.
        role: "self" or "cross", for `use_backend(..., role=...)`.
        caller: the calling module, named where the call is refused.

    Returns:
        [N, H, D].

    Raises:
        UsageError: arguments that do not fit together, an unknown backend or role, or somebody who observes attention
            calls, of which a packed one shows nothing.
        BackendError: with every reason, when the backend cannot serve the call.
    """
    check_tensors("packed_attention", query, key, value)
    key_segments = query_segments if key_segments is None else key_segments
    if query.device.type != "meta" and torch.is_autocast_enabled(query.device.type):
        query, key, value = cast_to_autocast(query.device.type, query, key, value)
    _check(query, key, value, query_segments, key_segments, dropout_p)
    if scale is not None:
        check_scale("packed_attention", scale)
    if role is not None:
        check_role(role)
    if not torch.compiler.is_compiling() and OBSERVERS.get():
        raise UsageError(
            f"attention maps and alignments cannot be read from packed sequences ({type(caller).__name__}): run them "
            "padded"
        )
    backend = selected(role) if backend == "auto" else backend
    scale = 1.0 / math.sqrt(query.shape[2]) if scale is None else scale
    request = PackedRequest(query, key, value, query_segments, key_segments, is_causal, scale, dropout_p)
    row = choose_packed(backend, _traits(request), request)
    if row is None or row.run_packed is None:
        return attend_groups(request, backend, role, caller)  # pyright: ignore[reportCallIssue]
    for name, segments in (("query", query_segments), ("key", key_segments)):
        if segments.cu_seqlens.device != query.device:
            raise UsageError(
                f"packed_attention: the {name} segments are on {segments.cu_seqlens.device}, query on {query.device}: "
                f"attention backend {row.name!r} reads them there, move them with segments.to(query.device)"
            )
    return row.run_packed(request)


def _traits(request: PackedRequest) -> Traits:
    query, key = request.query, request.key
    has_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, request.value))
    return Traits(
        device=query.device.type,
        dtype=query.dtype,
        head_dim=query.shape[2],
        is_grouped=query.shape[1] != key.shape[1],
        mask="none",
        has_mask_grad=False,
        has_key_mask=False,
        is_causal=request.is_causal,
        has_dropout=request.dropout_p > 0.0,
        has_grad=has_grad,
        needs_weights=False,
        wants_any_derivative=wants_any_derivative(),
    )


def _check(
    query: Tensor, key: Tensor, value: Tensor, query_segments: Segments, key_segments: Segments, dropout_p: float
) -> None:
    shapes = f"query {list(query.shape)}, key {list(key.shape)}, value {list(value.shape)}"
    if query.dim() != 3 or key.dim() != 3 or key.shape != value.shape or query.shape[2] != key.shape[2]:
        raise UsageError(f"packed_attention: {shapes}; query must be [N, H, D], key and value both [M, G, D]")
    if key.shape[1] == 0 or query.shape[1] % key.shape[1]:
        raise UsageError(f"packed_attention: {shapes}; the query heads must be a multiple of the key/value heads")
    for name, tensor, segments in (("query", query, query_segments), ("key", key, key_segments)):
        check_segments("packed_attention", segments)
        check_rows("packed_attention", name, tensor, segments)
    if len(query_segments) != len(key_segments):
        raise UsageError(
            f"packed_attention: {len(query_segments)} sequences of queries and {len(key_segments)} of "
            "keys: each sequence of queries needs one of keys"
        )
    if not query.dtype == key.dtype == value.dtype or not query.device == key.device == value.device:
        raise UsageError(
            f"packed_attention: query is {query.dtype} on {query.device}, key {key.dtype} on {key.device}, value "
            f"{value.dtype} on {value.device}; they must share dtype and device"
        )
    check_dropout("packed_attention", "dropout_p", dropout_p)


def check_rows(what: str, name: str, rows: Tensor, segments: Segments) -> None:
    """Check that rows `[N, ...]` are as many as their segments have.

    Raises:
        UsageError: they are not.
    """
    # torch.compile would make a code for each total.
    if not torch.compiler.is_compiling() and segments.total != rows.shape[0]:
        raise UsageError(f"{what}: {name} has {rows.shape[0]} rows, its segments {segments.total}: they must agree")
