"""One attention call in the form that backends get: checked, with masks of four axes and the scale filled in.

Shapes: B batch, H query heads, G key/value heads, Lq / Lk lengths, D head_dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mmattn.errors import UsageError
from mmattn.kernels.plain import wants_any_derivative
from mmattn.ops.masks import as_four_dim


@dataclass(slots=True)
class Request:
    """What a backend is asked to compute; see `mmattn.attention` for the meaning of each field."""

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None
    key_mask: Tensor | None
    is_causal: bool
    scale: float
    dropout_p: float
    return_weights: bool


class Traits(NamedTuple):
    """The features of a call that decide which backends can serve it. Hashable: the choice is remembered by them."""

    device: str
    dtype: torch.dtype
    head_dim: int
    is_grouped: bool
    mask: str
    has_mask_grad: bool
    has_key_mask: bool
    is_causal: bool
    has_dropout: bool
    has_grad: bool
    needs_weights: bool
    wants_any_derivative: bool


def prepare(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    key_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    dropout_p: float,
    return_weights: bool,
) -> Request:
    """Check a call's arguments and normalise them.

    Raises:
        UsageError: naming the argument, what it is and what it must be.
    """
    check_tensors("attention", query, key, value)
    device_type = query.device.type
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        query, key, value = cast_to_autocast(device_type, query, key, value)
    query_shape, key_shape = query.shape, key.shape
    if len(query_shape) != 4 or len(key_shape) != 4 or key_shape != value.shape:
        raise UsageError(
            f"attention: query {list(query_shape)}, key {list(key_shape)}, value {list(value.shape)}; "
            "query must be [B, H, Lq, D], key and value both [B, G, Lk, D]"
        )
    batch, heads, num_queries, head_dim = query_shape
    key_batch, kv_heads, num_keys, key_dim = key_shape
    if key_batch != batch or key_dim != head_dim or (heads != kv_heads and (kv_heads == 0 or heads % kv_heads)):
        raise UsageError(
            f"attention: query {list(query_shape)} does not fit key {list(key_shape)}; batch and head_dim must be "
            "equal, and the number of query heads a multiple of the key/value heads"
        )
    dtype = query.dtype
    if key.dtype is not dtype or value.dtype is not dtype or not dtype.is_floating_point:
        raise UsageError(
            f"attention: query is {dtype}, key {key.dtype}, value {value.dtype}; they must share one float dtype"
        )
    if key.device != query.device or value.device != query.device:
        raise UsageError(
            f"attention: query is on {query.device}, key on {key.device}, value on {value.device}; move them together"
        )
    if attn_mask is not None:
        _check_is_tensor("attn_mask", attn_mask)
        attn_mask = as_four_dim(attn_mask, batch, heads, num_queries, num_keys)
        _check_device("attn_mask", attn_mask, query)
    if key_mask is not None:
        _check_is_tensor("key_mask", key_mask)
        if key_mask.dtype is not torch.bool or key_mask.shape != (batch, num_keys):
            hint = "; convert a 1/0 mask with .bool()" if key_mask.dtype is not torch.bool else ""
            raise UsageError(
                f"attention: key_mask is {key_mask.dtype} {list(key_mask.shape)}, "
                f"it must be boolean [B, Lk] = {[batch, num_keys]}{hint}"
            )
        _check_device("key_mask", key_mask, query)
    check_dropout("attention", "dropout_p", dropout_p)
    if scale is None:
        scale = 1.0 / math.sqrt(head_dim) if head_dim else 1.0
    else:
        check_scale("attention", scale)
    # One query sees every key of a bottom-right aligned causal mask.
    is_causal = is_causal and num_queries > 1
    return Request(query, key, value, attn_mask, key_mask, is_causal, scale, dropout_p, return_weights)


def check_tensors(what: str, query: object, key: object, value: object) -> None:
    """Raise `UsageError` where one of the three is no tensor."""
    if not (isinstance(query, Tensor) and isinstance(key, Tensor) and isinstance(value, Tensor)):
        kinds = [type(given).__name__ for given in (query, key, value)]
        raise UsageError(f"{what}: query is a {kinds[0]}, key a {kinds[1]}, value a {kinds[2]}; all must be tensors")


def check_dropout(what: str, name: str, probability: float, *, may_drop_all: bool = False) -> None:
    """Raise `UsageError` for what is no probability of dropping, or drops everything."""
    if not 0.0 <= probability < 1.0 and not (may_drop_all and probability == 1.0):
        most = "at most" if may_drop_all else "below"
        raise UsageError(f"{what}: {name} is {probability}, it must be at least 0 and {most} 1")


def check_scale(what: str, scale: object) -> None:
    """Raise `UsageError` for a scale that is not a finite number."""
    if isinstance(scale, Tensor):
        raise UsageError(
            f"{what}: scale is a tensor, it must be a number (fused kernels have no gradient of it): multiply the "
            "query by the tensor and pass scale=1.0"
        )
    # Not `math.isfinite`: within torch.compile a scale may be a symbol.
    if not -math.inf < scale < math.inf:  # pyright: ignore[reportOperatorIssue]
        raise UsageError(f"{what}: scale is {scale}, it must be a finite number")


# Kernels compute with float32 numbers, of which those far below this one are zeros.
_LEAST_SCALE = 1e-30


def with_positive_scale(query: Tensor, scale: float) -> tuple[Tensor, float]:
    """Query and scale of the same products. Fused kernels scale what they have set to -inf (torch's CPU kernel where it
    is causal, flash attention behind the last key too), which makes NaN of a scale that is negative or zero."""
    if scale >= _LEAST_SCALE:
        return query, scale
    if scale <= -_LEAST_SCALE:
        return -query, -scale
    return query * scale, 1.0


def traits_of(request: Request) -> Traits:
    """The features of a request that backends' limits speak of."""
    query, key, mask = request.query, request.key, request.attn_mask
    has_grad = torch.is_grad_enabled()
    mask_grad = has_grad and mask is not None and mask.requires_grad
    has_grad = has_grad and (query.requires_grad or key.requires_grad or request.value.requires_grad or mask_grad)
    query_shape = query.shape
    return Traits(
        query.device.type,
        query.dtype,
        query_shape[3],
        query_shape[1] != key.shape[1],
        "none" if mask is None else "boolean" if mask.dtype is torch.bool else "float",
        mask_grad,
        request.key_mask is not None,
        request.is_causal,
        request.dropout_p > 0.0,
        has_grad,
        request.return_weights,
        wants_any_derivative(),
    )


def _check_is_tensor(name: str, mask: object) -> None:
    if not isinstance(mask, Tensor):
        raise UsageError(f"attention: {name} is a {type(mask).__name__}, it must be a tensor")


def _check_device(name: str, mask: Tensor, query: Tensor) -> None:
    if mask.device != query.device:
        raise UsageError(f"attention: {name} is on {mask.device}, query on {query.device}; move them together")


def cast_to_autocast(device_type: str, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast inputs take its dtype, as torch's own attention does; float64 stays."""
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(t.to(dtype) if t.is_floating_point() and t.dtype is not torch.float64 else t for t in tensors)
