"""Normalisation layers by name."""

from __future__ import annotations

from typing import Literal

from torch import nn

from mmattn.errors import UsageError

RMSNorm = nn.RMSNorm

NormKind = Literal["layer", "rms"]


def make_norm(kind: NormKind, dim: int, eps: float = 1e-5) -> nn.Module:
    """A normalisation over the last `dim` channels.

    Args:
        kind: "layer" (arXiv 1607.06450) or "rms" (arXiv 1910.07467).
        dim: Size of the last axis.
        eps: Added to the variance.

    Raises:
        UsageError: When `kind` is neither.
    """
    if kind == "layer":
        return nn.LayerNorm(dim, eps=eps)
    if kind == "rms":
        return nn.RMSNorm(dim, eps=eps)
    raise UsageError(f"norm {kind!r} is unknown: use 'layer' or 'rms'")
