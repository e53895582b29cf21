"""Our attention as a backend of diffusers' dispatcher, for models whose processors ask it (Flux, Wan and many more).

diffusers has no supported way of adding a backend: its list of names is a closed enum, and its registry private. Both
are touched here and nowhere else, only after a test that they look as expected, and both are put back as they were
when the last swap that uses them is restored.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from diffusers import __version__
from diffusers.models import attention_dispatch
from torch import Tensor

from mmattn.errors import UsageError
from mmattn.ops.masks import causal_mask
from mmattn.swap.attend import attend

_USERS: Counter[str] = Counter()


@dataclass(eq=False)
class RegisterBackend:
    """Registers the backend "mmattn_ROLE_BACKEND" while some swap uses it.

    Attributes:
        role: "self", "cross" or "joint".
        backend: a name of `mmattn.backends()`, or "auto".
    """

    role: str
    backend: str

    @property
    def name(self) -> str:
        """The string that diffusers knows it by."""
        return f"mmattn_{self.role}_{self.backend}"

    @property
    def member(self) -> Any:
        """The enum member, once registered."""
        return attention_dispatch.AttentionBackendName(self.name)

    def do(self) -> None:
        """Register."""
        check_dispatcher()
        if _USERS[self.name] == 0:
            _add_member(self.name)
            registry = attention_dispatch._AttentionBackendRegistry
            registry.register(self.member)(backend_function(self.role, self.backend))
        _USERS[self.name] += 1

    def undo(self, *, force: bool = False) -> str | None:
        """Take it out again, after its last user."""
        _USERS[self.name] -= 1
        if _USERS[self.name] <= 0:
            del _USERS[self.name]
            member, registry = self.member, attention_dispatch._AttentionBackendRegistry
            for table in (registry._backends, registry._constraints, registry._supported_arg_names):
                table.pop(member, None)
            _remove_member(self.name)
        return None

    def problem(self) -> str | None:
        """Whether somebody took it out."""
        is_there = self.name in attention_dispatch.AttentionBackendName._value2member_map_
        return None if is_there else f"diffusers' backend {self.name} is gone"


@dataclass(eq=False)
class UseBackend:
    """Lets one processor of a dispatcher model use a registered backend."""

    processor: Any
    backend: RegisterBackend
    _before: Any = None

    def do(self) -> None:
        """Set its `_attention_backend`."""
        self._before = self.processor._attention_backend
        self.processor._attention_backend = self.backend.member

    def undo(self, *, force: bool = False) -> str | None:
        """Put back what was set."""
        problem = self.problem()
        if problem is None or force:
            self.processor._attention_backend = self._before
            return None
        return problem

    def problem(self) -> str | None:
        """Whether `set_attention_backend` or the like has chosen another since."""
        current = self.processor._attention_backend
        if getattr(current, "value", None) == self.backend.name:
            return None
        return f"the processor's backend was set to {getattr(current, 'value', current)} since"


@dataclass(eq=False)
class KeepProcessDefault:
    """Puts diffusers' process-wide default backend back on restore: `model.set_attention_backend` changes it."""

    _before: Any = None

    def do(self) -> None:
        """Remember it."""
        self._before = attention_dispatch._AttentionBackendRegistry._active_backend

    def undo(self, *, force: bool = False) -> str | None:
        """Put it back."""
        attention_dispatch._AttentionBackendRegistry.set_active_backend(self._before)
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
        if mask.dtype is not mask.new_empty(0).bool().dtype:
            return None, padding[:, None, None, :]
        return padding, None
    return None, mask


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


def _add_member(name: str) -> None:
    enum: Any = attention_dispatch.AttentionBackendName
    member = str.__new__(enum, name)
    member._name_, member._value_ = name.upper(), name
    enum._member_map_[member._name_] = member
    enum._value2member_map_[name] = member
    enum._member_names_.append(member._name_)


def _remove_member(name: str) -> None:
    enum: Any = attention_dispatch.AttentionBackendName
    enum._member_map_.pop(name.upper(), None)
    enum._value2member_map_.pop(name, None)
    if name.upper() in enum._member_names_:
        enum._member_names_.remove(name.upper())
