"""Attention of packed short sequences as an operation of `torch.library`: what torch.compile keeps in its graph as it
is. `packed_rows_forward` and `packed_rows_backward` have the kernels.

Shapes: N rows of all queries, M of all keys, H query heads, G key/value heads, D head_dim, S sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from mmattn.kernels.launch import card_of
from mmattn.kernels.packed_rows_backward import backward_launches
from mmattn.kernels.packed_rows_blocks import rows_config
from mmattn.kernels.packed_rows_forward import forward_launch, num_blocks
from mmattn.kernels.plain import is_plain_call
from mmattn.kernels.plans import Plans, alignment

MAX_HEAD_DIM = 160
_FORWARD = Plans()
_BACKWARD = Plans()
# Tensors of a call in their order, as the kernels name them.
_FORWARD_NAMES: tuple[str, ...] = (
    "query", "key", "value", "output", "lse", "query_starts", "key_starts", "query_numbers", "key_numbers",
)  # fmt: skip
_BACKWARD_NAMES: tuple[str, ...] = (
    "grad_output", *_FORWARD_NAMES, "delta", "grad_query", "grad_key", "grad_value",
)  # fmt: skip
# Another for each batch: launches are remembered without them.
_VARYING = ("num_queries", "num_keys", "num_sequences")


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
    tensors = (query, key, value, output, lse, query_starts, key_starts, query_numbers, key_numbers)
    addresses = tuple([tensor.data_ptr() for tensor in tensors])
    own = (_num_blocks(query, are_keys=False), alignment(addresses))
    signature = _signature(query, key, value, is_causal, scale, own)
    plan = _FORWARD.find(signature)
    if plan is not None:
        plan.run(query.device, addresses, (query.shape[0], key.shape[0], query_starts.shape[0] - 1))
    else:
        launch = forward_launch(
            query, key, value, query_starts, key_starts, query_numbers, is_causal, scale, output, lse
        )
        named = dict(zip(_FORWARD_NAMES, tensors, strict=True))
        _FORWARD.make(signature, query.device, named, (launch,), varying=_VARYING)
    return output, lse


def _backward_of(
    grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    gradients = _gradients(query, key, value)
    if query.numel() == 0 or key.numel() == 0:
        return gradients[0].zero_(), gradients[1].zero_(), gradients[2].zero_()
    output, lse, query_starts, key_starts, query_numbers, key_numbers, is_causal, scale = rest
    delta = torch.empty_like(lse)
    places = (query_starts, key_starts, query_numbers, key_numbers)
    tensors = (grad_output, query, key, value, output, lse, *places, delta, *gradients)
    addresses = tuple([tensor.data_ptr() for tensor in tensors])
    blocks = (_num_blocks(query, are_keys=False), _num_blocks(key, are_keys=True))
    own = (blocks, grad_output.stride(), output.stride(), alignment(addresses))
    signature = _signature(query, key, value, is_causal, scale, own)
    plan = _BACKWARD.find(signature)
    if plan is not None:
        plan.run(query.device, addresses, (query.shape[0], key.shape[0], query_starts.shape[0] - 1))
    else:
        launches = backward_launches(
            grad_output, query, key, value, output, lse, *places, is_causal, scale, delta, gradients
        )
        named = dict(zip(_BACKWARD_NAMES, tensors, strict=True))
        _BACKWARD.make(signature, query.device, named, launches, varying=_VARYING)
    return gradients


def _signature(query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float, own: Hashable) -> Hashable:
    """All that launches depend on, besides what varies. (Strides of what is allocated like query follow from it.)"""
    sizes = (query.shape[1:], query.stride(), key.shape[1], key.stride(), value.stride())
    return query.device, query.dtype, sizes, is_causal, scale, own


def _num_blocks(rows: Tensor, are_keys: bool) -> int:
    num_rows, _, head_dim = rows.shape
    return num_blocks(num_rows, rows_config(card_of(rows.device), rows.dtype, head_dim, are_keys).block_m)


def _outputs(query: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(query), query.new_empty((query.shape[1], query.shape[0]), dtype=torch.float32)


def _gradients(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


@packed_rows_attention.register_fake
def _(query: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _outputs(query)


@packed_rows_attention_backward.register_fake
def _(grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _gradients(query, key, value)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, *places, is_causal, scale = inputs
    ctx.save_for_backward(query, key, value, *output, *places)
    ctx.options = (is_causal, scale)


def _save_operation(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _save(ctx, inputs, output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad_output: Tensor, _grad_lse: Tensor | None = None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    # With gradients of gradients wanted, the operation says that there are none.
    is_plain = not torch.is_grad_enabled() and is_plain_call(grad_output, *saved)
    run: Any = _backward_of if is_plain else packed_rows_attention_backward
    return (*run(grad_output, *saved, *ctx.options), *(None,) * 6)


packed_rows_attention.register_autograd(_backward, setup_context=_save_operation)


class _Attend(torch.autograd.Function):
    """Autograd's rule for calls that go round the dispatcher."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        output, lse = _forward(*inputs)
        _save(ctx, inputs, (output, lse))
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _backward(ctx, grad_output)


# `_Attend.apply` without its questions about torch.func, which `is_plain_call` has answered: half of what it costs.
_apply: Callable[..., Tensor] = super(torch.autograd.Function, _Attend).apply  # pyright: ignore[reportAttributeAccessIssue]
