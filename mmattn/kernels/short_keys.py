"""Attention over short keys as an operation of `torch.library`: what torch.compile keeps in its graph as it is.

Shapes: B batch, H query heads, G key/value heads, Lq / Lk lengths, D head_dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmattn.kernels.short_keys_backward import backward_launches
from mmattn.kernels.short_keys_forward import forward_launch

MAX_KEYS = 512
MAX_HEAD_DIM = 160


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
    output, lse = _outputs(query)
    if query.numel() == 0 or key.numel() == 0:
        return output.zero_(), lse.fill_(float("-inf"))
    forward_launch(query, key, value, key_mask, attn_mask, scale, output, lse).run(query.device)
    return output, lse


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
    if query.numel() == 0 or key.numel() == 0:
        gradients = _gradients(query, key, value)
        return gradients[0].zero_(), gradients[1].zero_(), gradients[2].zero_()
    backward = backward_launches(grad_output, query, key, value, output, lse, key_mask, attn_mask, scale)
    for launch in backward.launches:
        launch.run(query.device)
    return backward.grad_query, backward.grad_key, backward.grad_value


def _outputs(query: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(query), query.new_empty(query.shape[:3], dtype=torch.float32)


def _gradients(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


@short_key_attention.register_fake
def _(query: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _outputs(query)


@short_key_attention_backward.register_fake
def _(grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _gradients(query, key, value)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, key_mask, attn_mask, scale = inputs
    ctx.save_for_backward(query, key, value, *output, key_mask, attn_mask)
    ctx.scale = scale
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad_output: Tensor, _grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    gradients = short_key_attention_backward(grad_output, *ctx.saved_tensors, ctx.scale)
    return (*gradients, None, None, None)


short_key_attention.register_autograd(_backward, setup_context=_save)
