"""Attention of packed short sequences as an operation of `torch.library`: what torch.compile keeps in its graph as it
is. `packed_rows_forward` and `packed_rows_backward` have the kernels.

Shapes: N rows of all queries, M of all keys, H query heads, G key/value heads, D head_dim, S sequences.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from mmattn.kernels.autograd import differentiable, empty_gradients
from mmattn.kernels.launch import card_of
from mmattn.kernels.packed_rows_backward import backward_launches
from mmattn.kernels.packed_rows_blocks import rows_config
from mmattn.kernels.packed_rows_forward import forward_launch, num_blocks
from mmattn.kernels.plain import is_plain_call
from mmattn.kernels.plans import Plans

MAX_HEAD_DIM = 160
_NAMES = (
    "query", "key", "value", "output", "lse", "query_starts", "key_starts", "query_numbers", "key_numbers",
)  # fmt: skip
# Another for each batch: launches are remembered without them.
_VARYING = ("num_queries", "num_keys", "num_sequences")
_FORWARD = Plans(_NAMES, _VARYING)
_BACKWARD = Plans(("grad_output", *_NAMES, "delta", "grad_query", "grad_key", "grad_value"), _VARYING)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_starts: Tensor,
    key_starts: Tensor,
    query_numbers: Tensor,
    key_numbers: Tensor,
    is_causal: bool,
    scale: float,
) -> Tensor:
    """The output of `packed_rows_attention`, at the least cost to the processor: ordinary eager calls go round the
    dispatcher. The kernels, and so all bits, are the same."""
    inputs = (query, key, value, query_starts, key_starts, query_numbers, key_numbers, is_causal, scale)
    if not is_plain_call(query, key, value, query_starts, key_starts, query_numbers, key_numbers):
        return packed_rows_attention(*inputs)[0]
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        return _apply(*inputs)
    return _forward(*inputs)[0]


@torch.library.custom_op("mmattn::packed_rows_attention", mutates_args=())
def packed_rows_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_starts: Tensor,
    key_starts: Tensor,
    query_numbers: Tensor,
    key_numbers: Tensor,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """softmax(scale * query @ key^T) @ value within each sequence, and the logarithm of each row's sum of exponentials.

    A query that may attend to nothing gives zeros and -inf. What is not finite stays within its sequence.

    Args:
        query: [N, H, D], float32, bfloat16 or float16, any strides.
        key: [M, G, D], H a multiple of G, same dtype; D at most `MAX_HEAD_DIM`.
        value: [M, G, D].
        query_starts: int32 [S + 1], where each sequence's queries begin, and where the last one's end.
        key_starts: the same of the keys. A sequence may have no keys; keys behind the last are not read.
        query_numbers: int32 [N], the sequence of each query.
        key_numbers: int32 [M], the sequence of each key; S for those of none.
        is_causal: query i of a sequence sees its keys j <= i + Lk - Lq.
        scale: factor of the scores.

    Returns:
        (output [N, H, D] in the order of axes that query has in memory, lse float32 [H, N]). Gradients flow through the
        output only.
    """
    return _forward(query, key, value, query_starts, key_starts, query_numbers, key_numbers, is_causal, scale)


@torch.library.custom_op("mmattn::packed_rows_attention_backward", mutates_args=())
def packed_rows_attention_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    query_starts: Tensor,
    key_starts: Tensor,
    query_numbers: Tensor,
    key_numbers: Tensor,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value; arguments as in `packed_rows_attention`, the same bits in every run. Keys of
    no sequence get zeros.

    Args:
        grad_output: [N, H, D], any strides.
        query: [N, H, D].
        key: [M, G, D].
        value: [M, G, D].
        output: [N, H, D], the forward's.
        lse: float32 [H, N], the forward's.
        query_starts: the forward's.
        key_starts: the forward's.
        query_numbers: the forward's.
        key_numbers: the forward's.
        is_causal: the forward's.
        scale: the forward's.
    """
    tensors = (query, key, value, output, lse, query_starts, key_starts, query_numbers, key_numbers)
    return _backward_of(grad_output, *tensors, is_causal, scale)


def _forward(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    output, lse = _outputs(query)
    if query.numel() == 0 or key.numel() == 0:
        return output.zero_(), lse.fill_(float("-inf"))
    query_starts, key_starts, query_numbers, key_numbers, is_causal, scale = rest
    places = (query_starts, key_starts, query_numbers)
    _FORWARD.launch(
        (_sizes(query, key, value, is_causal, scale), _num_blocks(query, are_keys=False), output.stride()),
        (query, key, value, output, lse, *places, key_numbers),
        lambda: (forward_launch(query, key, value, *places, is_causal, scale, output, lse),),
        (query.shape[0], key.shape[0], query_starts.shape[0] - 1),
    )
    return output, lse


def _backward_of(
    grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    gradients = empty_gradients(query, key, value)
    if query.numel() == 0 or key.numel() == 0:
        return gradients[0].zero_(), gradients[1].zero_(), gradients[2].zero_()
    output, lse, query_starts, key_starts, query_numbers, key_numbers, is_causal, scale = rest
    delta = torch.empty_like(lse)
    places = (query_starts, key_starts, query_numbers, key_numbers)
    arguments = (grad_output, query, key, value, output, lse, *places)
    blocks = (_num_blocks(query, are_keys=False), _num_blocks(key, are_keys=True))
    strides = tuple([tensor.stride() for tensor in (grad_output, output, *gradients)])
    _BACKWARD.launch(
        (_sizes(query, key, value, is_causal, scale), blocks, strides),
        (*arguments, delta, *gradients),
        lambda: backward_launches(*arguments, is_causal, scale, delta, gradients),
        (query.shape[0], key.shape[0], query_starts.shape[0] - 1),
    )
    return gradients


def _sizes(query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float) -> Hashable:
    """All that launches depend on, of the forward's arguments, besides what varies and numbers of blocks. (Strides of
    what is allocated like them do not follow: head by head in memory, they go with the number of rows.)"""
    own = (query.shape[1:], query.stride(), key.shape[1], key.stride(), value.stride())
    return query.device, query.dtype, own, is_causal, scale


def _num_blocks(rows: Tensor, are_keys: bool) -> int:
    num_rows, _, head_dim = rows.shape
    return num_blocks(num_rows, rows_config(card_of(rows.device), rows.dtype, head_dim, are_keys).block_m)


def _outputs(query: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(query), query.new_empty((query.shape[1], query.shape[0]), dtype=torch.float32)


@packed_rows_attention.register_fake
def _(query: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _outputs(query)


_apply = differentiable(packed_rows_attention, packed_rows_attention_backward, _forward, _backward_of, num_options=2)
