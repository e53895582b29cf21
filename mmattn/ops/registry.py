"""The table of attention backends, and which of them serves a call.

One rule of precedence: the call's `backend` argument, else what `use_backend` says for the call's role, else the
first row of the table that can serve the call. A backend that was named never falls back to another.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor

from mmattn.errors import BackendError, UsageError
from mmattn.ops.backends import eager, flash, flex, sdpa, triton, triton_decode, triton_packed, varlen
from mmattn.ops.limits import AutoShape, Backend, auto_takes
from mmattn.ops.request import Request, Traits, prepare, traits_of
from mmattn.ops.segments import PackedRequest
from mmattn.ops.table import BackendTable, Explanation, describe

# Adding a backend is one file in `backends/` and one row here. "auto" takes the first row that can serve.
TABLE: tuple[Backend, ...] = (
    triton_packed.BACKEND,
    varlen.BACKEND,
    triton.BACKEND,
    triton_decode.BACKEND,
    flash.BACKEND,
    sdpa.BACKEND,
    flex.BACKEND,
    eager.BACKEND,
)
_BY_NAME = {backend.name: backend for backend in TABLE}
ROLES = ("self", "cross")


class Selection(NamedTuple):
    """What `use_backend` asked for: for self-attention, cross-attention, and calls without a role."""

    self_role: str = "auto"
    cross_role: str = "auto"
    no_role: str = "auto"


_SELECTION: ContextVar[Selection] = ContextVar("mmattn_backend_selection", default=Selection())  # noqa: B039


class Candidate(NamedTuple):
    """A backend that can serve calls with certain features; if "auto" takes it for some of them only, for which."""

    backend: Backend
    shapes: tuple[AutoShape, ...] | None


# Filled as calls come: the candidates for such features on this machine, in the table's order. Which of them serves a
# call depends on nothing more than its sizes, and whether it is replayed.
_CHOICES: dict[tuple[str, Traits], tuple[Candidate, ...]] = {}


@contextlib.contextmanager
def use_backend(name: str, role: str | None = None) -> Iterator[None]:
    """Within the block (and this thread or task only), attention without a `backend` argument runs on `name`.

    Gradient checkpointing computes anew in the backward: let that happen in the block, too, or give torch's
    `checkpoint` `context_fn=mmattn.ops.checkpoint_contexts`.

    Args:
        name: a backend's name, or "auto".
        role: "self" or "cross" to set only that one; None sets every call, those without a role included.

    Raises:
        UsageError: for an unknown backend or role.
    """
    check_name(name)
    check_role(role)
    before = _SELECTION.get()
    if role is None:
        selection = Selection(name, name, name)
    elif role == "self":
        selection = before._replace(self_role=name)
    else:
        selection = before._replace(cross_role=name)
    with _selecting(selection):
        yield


@torch.compiler.assume_constant_result
def selected(role: str | None) -> str:
    """The name that `use_backend` has set for a role here, "auto" if none.

    torch.compile cannot trace a context variable: what it compiles keeps the name that was set when it was compiled.
    """
    selection = _SELECTION.get()
    if role is None:
        return selection.no_role
    return selection.self_role if role == "self" else selection.cross_role


def check_name(name: str) -> None:
    """Raise `UsageError` for a name that is neither "auto" nor a backend."""
    if name != "auto" and name not in _BY_NAME:
        raise UsageError(f"unknown attention backend {name!r}; use one of: auto, {', '.join(_BY_NAME)}")


def check_role(role: str | None) -> None:
    """Raise `UsageError` for a role that does not exist."""
    if role is not None and role not in ROLES:
        raise UsageError(f'unknown attention role {role!r}; use "self", "cross" or None')


def choose(name: str, traits: Traits, request: Request) -> Backend:
    """The backend that serves a call, whose features are `traits`.

    Raises:
        UsageError: for an unknown name.
        BackendError: naming every reason, when the named backend, or every one that "auto" takes here, must refuse.
    """
    # torch.compile would guard on the table, which grows, and compile again: what it compiles chooses once anyway.
    is_compiling = torch.compiler.is_compiling()
    candidates = None if is_compiling else _CHOICES.get((name, traits))
    if candidates is None:
        check_name(name)
        candidates = _candidates(name, traits)
        if not is_compiling:
            _CHOICES[name, traits] = candidates
    for backend, shapes in candidates:
        # In this order: torch.compile guards what it compiles by the sizes that are looked at.
        if shapes is not None and not auto_takes(shapes, request):
            continue
        if not backend.limits.has_size_limits or not backend.limits.size_refusals(request):
            return backend
    raise _refusal(name, traits, request)


def auto_queries(device: torch.device, dtype: torch.dtype, head_dim: int) -> frozenset[int]:
    """Numbers of queries for which "auto" may choose another backend than for all others, on a device and for heads of
    a size: what is compiled for any number is better compiled anew for these."""
    rows = [row for row in TABLE if device.type in row.auto_devices]
    return frozenset(number for row in rows for number in row.auto_queries(device, dtype, head_dim))


def choose_packed(name: str, traits: Traits, request: PackedRequest) -> Backend | None:
    """The row that serves packed sequences, a call whose features are `traits`, as they are; None where one that knows
    only padded calls has to, group by group.

    Raises:
        UsageError: for an unknown name.
        BackendError: naming every reason, when a named backend for packed sequences must refuse.
    """
    if name == "auto":
        rows = (row for row in TABLE if row.run_packed is not None and not row.refusals(traits))
        return next((row for row in rows if row.suits_packed(request)), None)
    check_name(name)
    row = _BY_NAME[name]
    if row.run_packed is None:
        return None
    reasons = row.refusals(traits)
    if reasons:
        raise BackendError(f"attention backend {name!r} cannot serve this call: {'; '.join(reasons)}")
    return row


def backends() -> BackendTable:
    """The backends in the order in which "auto" tries them: usable here or why not, what each supports, versions,
    known-bad combinations. Print it, or look a row up by name."""
    return BackendTable(describe(backend) for backend in TABLE)


def explain(
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
) -> Explanation:
    """Which backend `mmattn.attention` would take for these arguments, and every reason against the others.

    Nothing is computed, and nothing raised for a backend that must refuse.

    Raises:
        UsageError: for arguments that do not fit together, or an unknown backend or role.
    """
    check_name(backend)
    check_role(role)
    source = "argument"
    if backend == "auto":
        backend = selected(role)
        source = "auto" if backend == "auto" else "use_backend"
    request = prepare(query, key, value, attn_mask, key_mask, is_causal, scale, dropout_p, return_weights)
    traits = traits_of(request)
    reasons = {row.name: _against(row, traits, request, backend) for row in TABLE}
    chosen = next((name for name, against in reasons.items() if not against), None)
    return Explanation(backend, source, chosen, reasons, traits)


def _candidates(name: str, traits: Traits) -> tuple[Candidate, ...]:
    """Those that serve calls with these features, sizes aside."""
    if name != "auto":
        return () if _BY_NAME[name].refusals(traits) else (Candidate(_BY_NAME[name], None),)
    # The cheap question first: the other one may import what a backend is made with.
    rows = [row for row in TABLE if not row.auto_refusals(traits) and not row.refusals(traits)]
    return tuple(Candidate(row, row.auto_shapes_for(traits)) for row in rows)


def _against(backend: Backend, traits: Traits, request: Request, asked: str) -> list[str]:
    """Every reason for which a backend does not serve a call."""
    reasons = backend.refusals(traits)
    if asked not in ("auto", backend.name):
        return [*reasons, *backend.limits.size_refusals(request), f"{asked} was asked for"]
    by_size, by_auto = backend.limits.size_refusals(request), []
    if asked == "auto":
        # Where it is not chosen for any call, the sizes for which it would be are beside the point.
        by_auto = backend.auto_refusals(traits) or backend.auto_size_refusals(request, traits)
    return [*reasons, *by_size, *by_auto]


def checkpoint_contexts() -> tuple[contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[None]]:
    """`context_fn` for `torch.utils.checkpoint.checkpoint(..., use_reentrant=False)`: recomputation in the backward,
    which may run in another thread and after the `use_backend` block, gets the backends that the forward had.

        with mmattn.use_backend("eager"):
            y = checkpoint(layer, x, use_reentrant=False, context_fn=mmattn.ops.checkpoint_contexts)
        y.sum().backward()  # the layer's attention runs on eager again

    In transformers `use_reentrant` and `context_fn` belong to the `gradient_checkpointing_kwargs`.
    """
    return contextlib.nullcontext(), _selecting(_SELECTION.get())


@contextlib.contextmanager
def _selecting(selection: Selection) -> Iterator[None]:
    token = _SELECTION.set(selection)
    try:
        yield
    finally:
        _SELECTION.reset(token)


def _refusal(name: str, traits: Traits, request: Request) -> BackendError:
    """The error for a call that no candidate serves."""
    if name != "auto":
        reasons = _against(_BY_NAME[name], traits, request, name)
        return BackendError(f"attention backend {name!r} cannot serve this call: {'; '.join(reasons)}")
    served = dict.fromkeys(device for row in TABLE for device in row.limits.dtypes)
    if traits.device not in served:
        hint = ": it has no values; for shapes alone torch has FakeTensorMode" if traits.device == "meta" else ""
        return BackendError(f"no attention backend serves device {traits.device} (only {', '.join(served)}){hint}")
    rows = (row for row in TABLE if traits.device in row.auto_devices)
    refused = [f"{row.name}: {'; '.join(_against(row, traits, request, name))}" for row in rows]
    return BackendError(f"no attention backend can serve this call. {'. '.join(refused)}")
