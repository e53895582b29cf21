"""Packed sequences on backends that know none: neighbours of like length share a call, padded inside it only.

Exact: what is padded is masked, or lies where causality hides it, and is left out of the result.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from mmattn.kernels.plain import is_eager_call, makes_fake_tensors
from mmattn.ops.attention import attention
from mmattn.ops.masks import lengths_mask
from mmattn.ops.segments import PackedRequest

# Nanoseconds, forward and backward, float32 on one core of an AVX2 machine: a call; an element of a padded query or key
# moved to its slot and back; a product of a query's and a key's element.
_CALL_COST = 100_000.0
_MOVE_COST = 3.0
_PRODUCT_COST = 0.75


@dataclass(frozen=True)
class Side:
    """How packed rows become slots of a padded tensor: the queries or keys of a group, `num_rows` rows as sequences of
    `longest`.

    `slots [n * longest]` names the row that fills each slot (where it is padding the sequence's own first, so that a
    NaN stays among its own), `rows [num_rows]` the slot of each row; both None where nothing is padded.
    """

    num_rows: int
    longest: int
    slots: Tensor | None
    rows: Tensor | None


@dataclass(frozen=True)
class _Group:
    size: int
    queries: Side
    keys: Side
    key_mask: Tensor | None


# Works by the lengths of each batch: a compiled one would hardly serve another.
@torch.compiler.disable
def attend_groups(request: PackedRequest, backend: str, role: str | None, caller: Any) -> Tensor:
    """Compute output [N, H, D] by calls of `mmattn.attention` on `backend`."""
    groups = (_groups.__wrapped__ if makes_fake_tensors() else _groups)(
        request.query_segments.lengths,
        request.key_segments.lengths,
        request.query.shape[1] * request.query.shape[2],
        request.is_causal,
        request.query.device,
    )
    query_sizes, key_sizes = ([getattr(group, side).num_rows for group in groups] for side in ("queries", "keys"))
    outputs = []
    # split, not slices: its backward writes each row's gradient once.
    for group, query, key, value in zip(
        groups,
        request.query.split(query_sizes),
        request.key.split(key_sizes),
        request.value.split(key_sizes),
        strict=True,
    ):
        output = attention(
            padded(query, group.size, group.queries),
            padded(key, group.size, group.keys),
            padded(value, group.size, group.keys),
            key_mask=group.key_mask,
            is_causal=request.is_causal,
            scale=request.scale,
            dropout_p=request.dropout_p,
            backend=backend,
            role=role,
            caller=caller,
        )
        output = cast(Tensor, output).transpose(1, 2).flatten(0, 1)
        outputs.append(output if group.queries.rows is None else output.index_select(0, group.queries.rows))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def padded(packed: Tensor, size: int, side: Side) -> Tensor:
    """Rows `[num_rows, H, D]` as `[size, H, longest, D]`, with gradients of the rows only."""
    if side.slots is not None and is_eager_call(packed):
        packed = cast(Tensor, _Spread.apply(packed, side.slots, side.rows))
    elif side.slots is not None:  # transforms of torch.func, which want functions in another form
        packed = packed.index_select(0, side.slots)
    return packed.unflatten(0, (size, side.longest)).transpose(1, 2)


class _Spread(torch.autograd.Function):
    """Rows into their slots. What a padding slot holds reaches no result, so its gradient is zero: the rows' gradients
    are picked, where `index_select`'s own backward would add all slots up."""

    @staticmethod
    def forward(ctx: Any, packed: Tensor, slots: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(slots, rows)
        return packed.index_select(0, slots)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        slots, rows = ctx.saved_tensors
        return _Gathered.apply(grad_outputs[0], rows, slots), None, None  # pyright: ignore[reportReturnType]


class _Gathered(torch.autograd.Function):
    """The opposite of `_Spread`, for gradients of gradients."""

    @staticmethod
    def forward(ctx: Any, padded: Tensor, rows: Tensor, slots: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.shape = padded.shape
        return padded.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (rows,) = ctx.saved_tensors
        return grad_outputs[0].new_zeros(ctx.shape).index_copy(0, rows, grad_outputs[0]), None, None


@functools.lru_cache(maxsize=64)
def _groups(
    query_lengths: tuple[int, ...], key_lengths: tuple[int, ...], width: int, is_causal: bool, device: torch.device
) -> tuple[_Group, ...]:
    """How to cut the sequences; remembered, since every layer of a step asks for the same."""
    # A tensor made in inference mode, and remembered, could not be saved for a later backward pass.
    with torch.inference_mode(False):
        return tuple(_made_groups(query_lengths, key_lengths, width, is_causal, device))


def _made_groups(
    query_lengths: tuple[int, ...], key_lengths: tuple[int, ...], width: int, is_causal: bool, device: torch.device
) -> Iterator[_Group]:
    for start, stop in _bounds(query_lengths, key_lengths, width, is_causal, device.type):
        lengths = (query_lengths[start:stop], key_lengths[start:stop])
        queries, keys = (side_of(each, device) for each in lengths)
        # Queries and keys of a causal group are padded alike, behind every real query's last key.
        needs_mask = keys.slots is not None and not is_causal
        mask = lengths_mask(torch.tensor(lengths[1]), keys.longest).to(device) if needs_mask else None
        yield _Group(stop - start, queries, keys, mask)


def side_of(lengths: tuple[int, ...], device: torch.device) -> Side:
    """The side of sequences of these lengths."""
    longest, total = max(lengths), sum(lengths)
    if longest * len(lengths) == total:
        return Side(total, longest, None, None)
    sizes, places = torch.tensor(lengths), torch.arange(longest)
    starts = torch.tensor([0, *itertools.accumulate(lengths)][:-1])
    slots = starts[:, None] + torch.where(places < sizes[:, None], places, 0)
    numbers = torch.arange(len(lengths)).repeat_interleave(sizes, output_size=total)
    rows = torch.arange(total) + (numbers * longest - starts[numbers])
    return Side(total, longest, slots.flatten().to(device), rows.to(device))


def _bounds(
    query_lengths: tuple[int, ...], key_lengths: tuple[int, ...], width: int, is_causal: bool, device: str
) -> Iterator[tuple[int, int]]:
    """From where to where each group reaches. A neighbour joins where padding costs less than a call of its own."""
    pairs = list(zip(query_lengths, key_lengths, strict=True))
    # Where a causal mask has to stand at each sequence's own end, only equal ones can share a call.
    only_equal = is_causal and query_lengths != key_lengths
    start, longest, is_padded, cost = 0, pairs[0], False, _cost(1, pairs[0], width, is_padded=False)
    for number, pair in enumerate(pairs[1:], start=1):
        joint = (max(longest[0], pair[0]), max(longest[1], pair[1]))
        would_pad = is_padded or longest != pair
        together = _cost(number + 1 - start, joint, width, is_padded=would_pad)
        alone = _cost(1, pair, width, is_padded=False)
        joins = not would_pad if only_equal else device != "cpu" or together <= cost + alone
        if joins:
            longest, is_padded, cost = joint, would_pad, together
        else:
            yield start, number
            start, longest, is_padded, cost = number, pair, False, alone
    yield start, len(pairs)


def _cost(size: int, longest: tuple[int, int], width: int, *, is_padded: bool) -> float:
    """Nanoseconds of a call for so many sequences, padded to so many queries and keys."""
    queries, keys = longest
    moves = _MOVE_COST * (queries + keys) if is_padded else 0.0
    return _CALL_COST + size * width * (moves + _PRODUCT_COST * queries * keys)
