"""Attention over short keys as an operation of `torch.library`: what torch.compile keeps in its graph as it is.

Shapes: B batch, H query heads, G key/value heads, Lq / Lk lengths, D head_dim.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from mmattn.kernels.autograd import differentiable, empty_gradients
from mmattn.kernels.plain import is_plain_call
from mmattn.kernels.plans import Plans
from mmattn.kernels.short_keys_backward import backward_launches
from mmattn.kernels.short_keys_forward import forward_launch

MAX_KEYS = 512
MAX_HEAD_DIM = 160
_NAMES = ("query", "key", "value", "output", "lse", "key_mask", "attn_mask")
_FORWARD = Plans(_NAMES)
_BACKWARD = Plans(("grad_output", *_NAMES, "grad_query", "grad_key", "grad_value"))


def attend(
    query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, attn_mask: Tensor | None, scale: float
) -> Tensor:
    """The output of `short_key_attention`, at the least cost to the processor: ordinary eager calls go round the
    dispatcher, which takes longer than the launch. The kernels, and so all bits, are the same."""
    if not is_plain_call(query, key, value, key_mask, attn_mask):
        return short_key_attention(query, key, value, key_mask, attn_mask, scale)[0]
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        return _apply(query, key, value, key_mask, attn_mask, scale)
    return _forward(query, key, value, key_mask, attn_mask, scale)[0]


@torch.library.custom_op("mmattn::short_key_attention", mutates_args=())
def short_key_attention(
    query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, attn_mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """softmax(scale * query @ key^T) @ value, and the logarithm of each row's sum of exponentials.

    A row that may attend to nothing gives zeros and -inf. Keys and values that `key_mask` leaves out are not read.

    Args:
        query: [B, H, Lq, D], float32, bfloat16 or float16, any strides.
        key: [B, G, Lk, D], H a multiple of G, same dtype; Lk at most `MAX_KEYS`, D at most `MAX_HEAD_DIM`.
        value: [B, G, Lk, D].
        key_mask: boolean, broadcastable to [B, G, Lk], True = may be attended to.
        attn_mask: boolean [B or 1, H or 1, Lq or 1, Lk], True = may attend. A key that no query may attend to has to
            be left out by `key_mask` too: here it is read, and its NaN would go everywhere.
        scale: factor of the scores.

    Returns:
        (output [B, H, Lq, D] in the order of axes that query has in memory, lse float32 [B, H, Lq]). Gradients flow
        through the output only.
    """
    return _forward(query, key, value, key_mask, attn_mask, scale)


@torch.library.custom_op("mmattn::short_key_attention_backward", mutates_args=())
def short_key_attention_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    key_mask: Tensor | None,
    attn_mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value; arguments as in `short_key_attention`, the same bits in every run.

    Args:
        grad_output: [B, H, Lq, D], any strides.
        query: [B, H, Lq, D].
        key: [B, G, Lk, D].
        value: [B, G, Lk, D].
        output: [B, H, Lq, D], the forward's.
        lse: float32 [B, H, Lq], the forward's.
        key_mask: the forward's.
        attn_mask: the forward's.
        scale: the forward's.
    """
    return _backward_of(grad_output, query, key, value, output, lse, key_mask, attn_mask, scale)


def _forward(
    query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, attn_mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    output, lse = _outputs(query)
    if query.numel() == 0 or key.numel() == 0:
        return output.zero_(), lse.fill_(float("-inf"))
    _FORWARD.launch(
        _sizes(query, key, value, key_mask, attn_mask, scale),
        (query, key, value, output, lse, key_mask, attn_mask),
        lambda: (forward_launch(query, key, value, key_mask, attn_mask, scale, output, lse),),
    )
    return output, lse


def _backward_of(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    key_mask: Tensor | None,
    attn_mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    gradients = empty_gradients(query, key, value)
    if query.numel() == 0 or key.numel() == 0:
        return gradients[0].zero_(), gradients[1].zero_(), gradients[2].zero_()
    arguments = (grad_output, query, key, value, output, lse, key_mask, attn_mask)
    sizes = _sizes(query, key, value, key_mask, attn_mask, scale)
    _BACKWARD.launch(
        (sizes, grad_output.stride(), output.stride()),
        (*arguments, *gradients),
        lambda: backward_launches(*arguments, scale, gradients=gradients).launches,
    )
    return gradients


def _sizes(
    query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, attn_mask: Tensor | None, scale: float
) -> Hashable:
    """All that launches depend on, of the forward's arguments. (Strides of what is allocated like query follow.)"""
    masks = None
    if key_mask is not None or attn_mask is not None:
        masks = tuple([None if mask is None else (mask.shape, mask.stride()) for mask in (key_mask, attn_mask)])
    own = (query.shape, query.stride(), key.shape, key.stride(), value.stride())
    return query.device, query.dtype, own, masks, scale


def _outputs(query: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(query), query.new_empty(query.shape[:3], dtype=torch.float32)


@short_key_attention.register_fake
def _(query: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _outputs(query)


_apply = differentiable(short_key_attention, short_key_attention_backward, _forward, _backward_of, num_options=1)
