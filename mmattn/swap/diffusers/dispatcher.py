"""Our attention as a backend of diffusers' dispatcher, for models whose processors ask it (Flux, Wan and many more).

diffusers has no supported way of adding a backend: its list of names is a closed enum, and its registry private. Both
are touched here and nowhere else, only after a test that they look as expected, and both are put back as they were
when the last swap that uses them is restored.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet, ref

import torch
from diffusers import __version__
from diffusers.models import attention_dispatch
from torch import Tensor

from mmattn.errors import UsageError
from mmattn.ops.masks import causal_mask
from mmattn.swap.attend import attend

FLEX = ("flex", "_native_flex")  # diffusers' names; some processors hand it masks of torch's flex attention
# Processors that name a backend themselves for some of their calls, whatever they are set to.
SET_IN_CODE = frozenset({"QwenImage21AttnProcessor", "QwenImage21FlexAttnProcessor", "WanAnimate2AttnProcessor"})
_USERS: defaultdict[str, WeakSet[Any]] = defaultdict(WeakSet)  # a backend's name: the processors that are set to it
_DEFAULTS: list[ref[KeepProcessDefault]] = []  # in the order in which they were taken


@dataclass(eq=False)
class RegisterBackend:
    """Registers the backend "mmattn_ROLE_BACKEND" while some processor uses it.

    Attributes:
        role: "self", "cross" or "joint".
        backend: a name of `mmattn.backends()`, or "auto".
    """

    role: str
    backend: str
    _members: list[Any] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The string that diffusers knows it by."""
        return f"mmattn_{self.role}_{self.backend}"

    def do(self) -> None:
        """Register."""
        check_dispatcher()
        if self.problem() is not None:
            member = _add_member(self.name)
            registry = attention_dispatch._AttentionBackendRegistry
            registry.register(member)(backend_function(self.role, self.backend))

    def undo(self, *, force: bool = False) -> str | None:
        """Take it out again when no processor uses it any more, and any other of ours that a swap has left whose handle
        is gone."""
        registry = attention_dispatch._AttentionBackendRegistry
        for name in [name for name in {self.name, *_USERS} if not _USERS[name]]:
            del _USERS[name]
            if name not in attention_dispatch.AttentionBackendName._value2member_map_:
                continue
            member = _remove_member(name)
            for table in (registry._backends, registry._constraints, registry._supported_arg_names):
                table.pop(member, None)
        return None

    def member(self, before: Any) -> Any:
        """What the processors are set to whose backend was `before`: one object for all of them, since torch.compile
        looks at its identity, and would else compile every block of `compile_repeated_blocks` by itself."""
        for member in self._members:
            if member.before is before:
                return member
        member = _member(self.name)
        member.before = before
        member.__deepcopy__ = lambda memo: before
        member.__reduce_ex__ = lambda protocol: (type(None), ()) if before is None else before.__reduce_ex__(protocol)
        self._members.append(member)
        return member

    def problem(self) -> str | None:
        """Whether somebody took it out."""
        is_there = self.name in attention_dispatch.AttentionBackendName._value2member_map_
        return None if is_there else f"diffusers' backend {self.name} is gone"


@dataclass(eq=False)
class UseBackend:
    """Lets one layer of a dispatcher model use a registered backend, by its processor. A copy of the processor, pickled
    or not, has what was set before: no handle takes care of it, and the backend may go, or be of another process."""

    attn: Any
    processor: Any
    backend: RegisterBackend
    _before: Any = None
    _was_there: bool = False

    def do(self) -> None:
        """Set its `_attention_backend`."""
        current = self.processor._attention_backend  # of its class, where it has none itself
        self._was_there = "_attention_backend" in vars(self.processor)
        self._before = getattr(current, "before", current)  # of stock, where a swap's handle is gone
        self.processor._attention_backend = self.backend.member(self._before)
        for users in _USERS.values():
            users.discard(self.processor)
        _USERS[self.backend.name].add(self.processor)

    def undo(self, *, force: bool = False) -> str | None:
        """Put back what was set, and with `force` the processor."""
        _USERS[self.backend.name].discard(self.processor)
        # Another layer with this processor may have put it back.
        other = None if self.processor._attention_backend is self._before else self._other_backend()
        if other is None or force:
            if self._was_there:
                self.processor._attention_backend = self._before
            else:
                vars(self.processor).pop("_attention_backend", None)
        problem = self._other_processor() or other
        if problem is None or not force:
            return problem
        if self.attn.processor is not self.processor:
            self.attn.set_processor(self.processor)
        return None

    def problem(self) -> str | None:
        """Whether `set_attn_processor` or the like has put in another processor since, or `set_attention_backend` has
        chosen another backend."""
        return self._other_processor() or self._other_backend()

    def _other_processor(self) -> str | None:
        current = self.attn.processor
        if current is self.processor:
            return None
        kind = type(current).__name__
        return f"its processor was replaced, by one of {kind} (IP-Adapter loading and set_attn_processor do so)"

    def _other_backend(self) -> str | None:
        current = self.processor._attention_backend
        if getattr(current, "value", None) == self.backend.name:
            return None
        return f"the processor's backend was set to {getattr(current, 'value', current)} since"


@dataclass(eq=False)
class KeepProcessDefault:
    """Puts diffusers' process-wide default backend back on restore: `model.set_attention_backend` changes it."""

    _before: Any = None
    _left: Any = None

    def do(self) -> None:
        """Remember it; done again after `undo`, set what was set when it was undone."""
        registry = attention_dispatch._AttentionBackendRegistry
        self._before = registry._active_backend
        if self._left is not None:
            registry.set_active_backend(self._left)
        _DEFAULTS[:] = [kept for kept in _DEFAULTS if kept() is not None] + [ref(self)]

    def undo(self, *, force: bool = False) -> str | None:
        """Put it back. What was set meanwhile is not a later swap's "before" either."""
        registry = attention_dispatch._AttentionBackendRegistry
        kept = [step for each in _DEFAULTS if (step := each()) is not None]
        later = kept[kept.index(self) + 1 :]
        if later:
            later[0]._before = self._before
        _DEFAULTS.remove(ref(self))
        self._left = registry._active_backend
        registry.set_active_backend(self._before)
        return None

    def problem(self) -> str | None:
        """It may change: that is what it is kept for."""
        return None


def backend_function(role: str, backend: str) -> Callable[..., Tensor]:
    """A backend as diffusers calls it: [B, L, H, D] in and out."""

    def mmattn_attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        _parallel_config: Any = None,
    ) -> Tensor:
        if _parallel_config is not None:
            raise UsageError("mmattn's backend does not split attention over devices: turn context parallelism off")
        query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
        if not enable_gqa and query.shape[1] != key.shape[1]:
            raise UsageError(f"{query.shape[1]} query heads, {key.shape[1]} key heads, and enable_gqa is off")
        key_mask, attn_mask = split_mask(attn_mask, query, key)
        if is_causal and query.shape[2] != key.shape[2]:
            # diffusers means causality from the first query and key on, mmattn to the last ones.
            causal = causal_mask(query.shape[2], key.shape[2], offset=0, device=query.device)
            if attn_mask is not None:
                raise UsageError("attn_mask and is_causal together need as many queries as keys here")
            attn_mask, is_causal = causal, False
        output = attend(
            query,
            key,
            value,
            attn_mask=attn_mask,
            key_mask=key_mask,
            is_causal=is_causal,
            scale=scale,
            dropout_p=dropout_p,
            role=role if role in ("self", "cross") else None,
            backend=backend,
        )
        return output.transpose(1, 2)

    return mmattn_attention


def split_mask(mask: Tensor | None, query: Tensor, key: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """A dispatcher mask as (key_mask [B, Lk], attn_mask): padding is taken off the general mask, where it is fast.

    As diffusers' native backend does, a mask of two axes that fits [B, Lk] is padding.
    """
    if mask is None:
        return None, None
    batch, num_keys = key.shape[0], key.shape[2]
    padding = mask
    if mask.dim() == 4 and mask.shape[1] == mask.shape[2] == 1:
        padding = mask[:, 0, 0]
    if padding.dim() == 2 and padding.shape == (batch, num_keys):
        return (padding, None) if mask.dtype is torch.bool else (None, padding[:, None, None, :])
    # torch broadcasts a mask of three axes over heads, mmattn over the batch.
    return None, mask.unsqueeze(0) if mask.dim() == 3 else mask


def check_dispatcher() -> None:
    """Raise `UsageError` when diffusers' dispatcher is not built as this file expects."""
    enum, registry = attention_dispatch.AttentionBackendName, attention_dispatch._AttentionBackendRegistry
    expected = {"query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa", "backend"}
    is_as_expected = (
        all(hasattr(registry, name) for name in ("_backends", "_constraints", "_supported_arg_names", "register"))
        and all(hasattr(enum, name) for name in ("_member_map_", "_value2member_map_", "_member_names_"))
        and expected <= set(inspect.signature(attention_dispatch.dispatch_attention_fn).parameters)
    )
    if not is_as_expected:
        raise UsageError(
            f"diffusers {__version__}: its attention dispatcher is not built as in 0.42, to which mmattn can add a "
            "backend; swap its other layers with parts=, or install diffusers 0.42"
        )


def _member(name: str) -> Any:
    """A member of diffusers' enum, equal to every other of its name."""
    member: Any = str.__new__(attention_dispatch.AttentionBackendName, name)
    member._name_, member._value_ = name.upper(), name
    return member


def _add_member(name: str) -> Any:
    enum: Any = attention_dispatch.AttentionBackendName
    member = _member(name)
    enum._member_map_[member._name_] = member
    enum._value2member_map_[name] = member
    enum._member_names_.append(member._name_)
    return member


def _remove_member(name: str) -> Any:
    enum: Any = attention_dispatch.AttentionBackendName
    enum._member_names_.remove(name.upper())
    enum._member_map_.pop(name.upper())
    return enum._value2member_map_.pop(name)
