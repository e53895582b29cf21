"""Fusing the projections of every attention in a module, for inference."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from mmattn.errors import UsageError
from mmattn.nn.projected_attention import ProjectedAttention

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def fuse(module: ModuleT) -> ModuleT:
    """Pack QKV (self) or KV (cross) into one product in every attention of a module, in place.

    `state_dict` keeps its keys and values. Either every attention is fused or, on an error, none.

    Args:
        module: `SelfAttention`, `CrossAttention`, a layer or a whole network, in `eval()` mode.

    Returns:
        The same module.

    Raises:
        UsageError: When an attention refuses: training mode, an adapter, a quantised weight, hooks. All are named.
    """
    attentions = {name: child for name, child in module.named_modules() if isinstance(child, ProjectedAttention)}
    refusals = {
        name or type(child).__name__: reasons
        for name, child in attentions.items()
        if not child.is_fused and (reasons := child.fuse_refusals())
    }
    if refusals:
        raise UsageError("fuse: " + "; ".join(f"{name}: {', '.join(reasons)}" for name, reasons in refusals.items()))
    for child in attentions.values():
        child.fuse()
    return module


def unfuse(module: ModuleT) -> ModuleT:
    """Undo `fuse` in every attention of a module, in place; returns the module."""
    for child in module.modules():
        if isinstance(child, ProjectedAttention):
            child.unfuse()
    return module
