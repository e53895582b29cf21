"""The one attention operation: every model, and every swapped module, computes attention by calling it.

Shapes: B batch, H query heads, G key/value heads, Lq / Lk lengths, D head_dim.
"""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from mmattn.ops.limits import Backend
from mmattn.ops.observe import OBSERVERS, STEER, AttentionCall, Observer
from mmattn.ops.registry import check_role, choose, selected
from mmattn.ops.request import Request, prepare, traits_of
from mmattn.ops.same_pass import MapsAsked


@overload
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attn_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    backend: str = "auto",
    return_weights: Literal[False] = False,
    role: str | None = None,
    caller: Any = None,
) -> Tensor: ...


@overload
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attn_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    backend: str = "auto",
    return_weights: Literal[True],
    role: str | None = None,
    caller: Any = None,
) -> tuple[Tensor, Tensor]: ...


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attn_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    backend: str = "auto",
    return_weights: bool = False,
    role: str | None = None,
    caller: Any = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale * query @ key^T) @ value over the keys that each query may attend to.

    The three masks combine by "and". A finite query that may attend to nothing gives exactly zero, and zero gradients.
    A key that no query of its row and head may attend to has no influence, on output or gradients, even if it is NaN.

    Fused kernels have neither forward-mode derivatives nor those of gradients. Within `torch.func` "auto" takes eager
    for these (`jvp`, `hessian`, `grad` of `grad`); where gradients made with `create_graph=True` are differentiated,
    name `backend="eager"`.

    Args:
        query: [B, H, Lq, D].
        key: [B, G, Lk, D]; H is a multiple of G (grouped-query attention; multi-query with G = 1), and query head h
            uses key/value head h // (H / G).
        value: [B, G, Lk, D].
        attn_mask: [Lq, Lk], [B, Lq, Lk] or [B, H, Lq, Lk], axes of size 1 broadcast. Boolean (True = may attend), or a
            float bias added to the scores, in which -inf means "may not attend" (no NaN, no +inf).
        key_mask: boolean [B, Lk], True = may be attended to: padding. Keep it apart from `attn_mask`, it stays on the
            fast path.
        is_causal: query i may attend to keys j <= i + Lk - Lq (aligned at the last query and the last key).
        scale: factor of the scores, a finite number; 1 / sqrt(D) by default.
        dropout_p: probability of dropping a weight. It is applied whenever it is not 0: pass 0 outside training.
        backend: a name of `mmattn.backends()`, or "auto": what `use_backend` says, else the first that can serve.
        return_weights: also return the weights [B, H, Lq, Lk], before dropout. Only the eager backend has them.
        role: "self" or "cross", for `use_backend(..., role=...)` and for observers.
        caller: handed to observers as it is.

    Returns:
        output [B, H, Lq, D], or (output, weights).

    Raises:
        UsageError: for arguments that do not fit together, or an unknown backend or role.
        BackendError: with every reason, when the named backend (with "auto" every one that it takes on such a device)
            cannot serve the call.
    """
    if role is not None:
        check_role(role)
    if backend == "auto":
        backend = selected(role)
    request = prepare(query, key, value, attn_mask, key_mask, is_causal, scale, dropout_p, return_weights)
    # torch.compile cannot trace a context variable: compiled calls are neither steered nor observed.
    steer = None if torch.compiler.is_compiling() else STEER.get()
    if steer is not None and not return_weights:
        return steer(request, lambda changed: _serve(changed, backend, role, caller)[0])
    output, weights = _serve(request, backend, role, caller)
    if return_weights:
        assert weights is not None  # backends that cannot return weights have refused
        return output, weights
    return output


def _serve(request: Request, backend: str, role: str | None, caller: Any) -> tuple[Tensor, Tensor | None]:
    """Choose a backend, run it and tell the observers."""
    chosen = choose(backend, traits_of(request), request)
    observers = () if torch.compiler.is_compiling() else OBSERVERS.get()
    if not observers:
        return chosen.run(request)
    return _serve_observed(request, chosen, observers, role, caller)


def _serve_observed(
    request: Request, chosen: Backend, observers: tuple[Observer, ...], role: str | None, caller: Any
) -> tuple[Tensor, Tensor | None]:
    """Run a backend, with the weights that an observer asks for where it gives them, and tell the observers."""
    asked = _asked(request, chosen, observers, caller)
    if asked is not None and chosen.run_with_maps is not None:
        output, maps = chosen.run_with_maps(request, asked)
        weights = None
    else:
        (output, weights), maps = chosen.run(request), None
    call = AttentionCall(
        query=request.query,
        key=request.key,
        value=request.value,
        attn_mask=request.attn_mask,
        key_mask=request.key_mask,
        is_causal=request.is_causal,
        scale=request.scale,
        role=role,
        backend=chosen.name,
        caller=caller,
        output=output,
        maps=maps,
    )
    for observer in observers:
        observer.tell(call)
    return output, weights


def _asked(request: Request, chosen: Backend, observers: tuple[Observer, ...], caller: Any) -> MapsAsked | None:
    """The weights that the first of the observers to ask wants of a call."""
    if chosen.run_with_maps is None or request.return_weights:
        return None
    asked = (observer.ask(request, caller) for observer in observers if observer.ask is not None)
    return next((each for each in asked if each is not None and each.fits(request)), None)
