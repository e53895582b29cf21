"""Our attention function and its mask function in transformers' two registries.

A name that is only in the registry of functions gets no masks at all: padding would be attended to without a word. So
both are registered and both taken out again, together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig, __version__
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from mmattn.errors import UsageError
from mmattn.swap.transformers.interface import mmattn_attention
from mmattn.swap.transformers.settings import NAME, are_in_use

_ABSENT: Any = object()
_BEFORE: dict[type, Any] = {}  # what the registries had under our name, while ours is there


def register() -> None:
    """Make our name known, if it is not yet."""
    for interface, ours in _entries():
        mapping = interface._global_mapping
        if mapping.get(NAME) is not ours:
            _BEFORE[interface] = mapping.get(NAME, _ABSENT)
            interface.register(NAME, ours)


def unregister() -> None:
    """Put back what was there under our name."""
    for interface, ours in _entries():
        mapping, before = interface._global_mapping, _BEFORE.pop(interface, _ABSENT)
        if mapping.get(NAME) is not ours:
            continue
        if before is _ABSENT:
            del mapping[NAME]
        else:
            mapping[NAME] = before


def is_registered() -> bool:
    """Whether our functions are what transformers finds under our name."""
    return all(interface._global_mapping.get(NAME) is ours for interface, ours in _entries())


def _entries() -> tuple[tuple[Any, Any], ...]:
    return (AttentionInterface, mmattn_attention), (AttentionMaskInterface, sdpa_mask)


@dataclass(eq=False)
class Register:
    """Registers our functions while any model is swapped, copies of swapped models included."""

    def do(self) -> None:
        """Register."""
        check_transformers()
        register()

    def undo(self, *, force: bool = False) -> str | None:
        """Take them out again, after their last user."""
        if not are_in_use():
            unregister()
        return None

    def problem(self) -> str | None:
        """Whether somebody took them out."""
        return None if is_registered() else f"transformers' attention implementation {NAME!r} was unregistered since"


def check_transformers() -> None:
    """Raise `UsageError` when transformers' attention interface is not built as this folder expects."""
    is_as_expected = (
        all(
            hasattr(interface, name)
            for interface in (AttentionInterface, AttentionMaskInterface)
            for name in ("register", "_global_mapping")
        )
        and hasattr(AttentionInterface, "get_interface")
        and isinstance(getattr(PreTrainedConfig, "_attn_implementation", None), property)
        and "_attn_implementation_internal" in vars(PreTrainedConfig())
    )
    if not is_as_expected:
        raise UsageError(
            f"transformers {__version__}: its attention interface is not built as in 5.24, to which mmattn can add a "
            "function; install transformers 5.24"
        )
