"""Seeing attention calls while they happen, without touching them, and changing them: the hooks that attention maps
and steering are built on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mmattn.ops.request import Request


@dataclass(frozen=True, eq=False, slots=True)
class AttentionCall:
    """One finished call of `mmattn.attention`, as its observers get it. Tensors are the call's own, not copies.

    Attributes:
        query: [B, H, Lq, D].
        key: [B, G, Lk, D].
        value: [B, G, Lk, D].
        attn_mask: boolean or float, broadcastable to [B, H, Lq, Lk] with four axes; None without one.
        key_mask: boolean [B, Lk], or None.
        is_causal: bottom-right aligned causal mask.
        scale: factor of the scores.
        role: "self", "cross" or None.
        backend: name of the backend that served the call.
        caller: what the caller passed as `caller`, usually the calling module.
        output: [B, H, Lq, D].
    """

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None
    key_mask: Tensor | None
    is_causal: bool
    scale: float
    role: str | None
    backend: str
    caller: Any
    output: Tensor


Observer = Callable[[AttentionCall], None]

# Read by `attention` in every call: with nobody looking, that is all an observer costs.
OBSERVERS: ContextVar[tuple[Observer, ...]] = ContextVar("mmattn_attention_observers", default=())


@contextlib.contextmanager
def observing(callback: Observer) -> Iterator[None]:
    """Within the block (and this thread or task only), `callback` is told of every attention call after it is done.

    The output stays bit for bit what it is without an observer. Blocks nest: every callback is told, outermost first.
    What `callback` raises, the caller of `attention` sees. Calls inside a graph of torch.compile are not observed.
    """
    token = OBSERVERS.set((*OBSERVERS.get(), callback))
    try:
        yield
    finally:
        OBSERVERS.reset(token)


@contextlib.contextmanager
def unobserved() -> Iterator[None]:
    """Within the block no observer is told of anything."""
    token = OBSERVERS.set(())
    try:
        yield
    finally:
        OBSERVERS.reset(token)


Steer = Callable[[Request, Callable[[Request], Tensor]], Tensor]

# Read by `attention` in every call, as `OBSERVERS` is.
STEER: ContextVar[Steer | None] = ContextVar("mmattn_attention_steer", default=None)


@contextlib.contextmanager
def steering(steer: Steer) -> Iterator[None]:
    """Within the block (and this thread or task only), `steer(request, run)` answers every attention call in place of
    `run(request)`, which computes one: with other queries, keys, values or masks, or several times. Observers are told
    of what is run. Calls that return weights, and calls inside a graph of torch.compile, are not steered. An inner
    block takes the place of an outer one.
    """
    token = STEER.set(steer)
    try:
        yield
    finally:
        STEER.reset(token)
