"""Seeing attention calls while they happen, without touching them, and changing them: the hooks that attention maps
and steering are built on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from mmattn.ops.request import Request
from mmattn.ops.same_pass import MapsAsked, SamePassMaps


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
        maps: weights that one of the observers asked for, where the backend gives them; None otherwise.
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
    maps: SamePassMaps | None = None


class Observer(NamedTuple):
    """Attributes: what is told of every call, and what says which weights are wanted of a call that is about to run (a
    request and its caller), if any."""

    tell: Callable[[AttentionCall], None]
    ask: Callable[[Request, Any], MapsAsked | None] | None = None


# Read by `attention` in every call: with nobody looking, that is all an observer costs.
OBSERVERS: ContextVar[tuple[Observer, ...]] = ContextVar("mmattn_attention_observers", default=())


@contextlib.contextmanager
def observing(
    callback: Callable[[AttentionCall], None], ask: Callable[[Request, Any], MapsAsked | None] | None = None
) -> Iterator[None]:
    """Within the block (and this thread or task only), `callback` is told of every attention call after it is done.

    The output stays bit for bit what it is without an observer. Blocks nest: every callback is told, outermost first.
    What `callback` raises, the caller of `attention` sees. Calls inside a graph of torch.compile are not observed.

    Args:
        callback: told of finished calls.
        ask: given the request and the caller of a call before it runs, says which weights are wanted of it. A backend
            that computes them in the same pass gives them with the call, `AttentionCall.maps`, to the outermost that
            asks; who asked knows them by `maps.asked`. Elsewhere there are none.
    """
    token = OBSERVERS.set((*OBSERVERS.get(), Observer(callback, ask)))
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
