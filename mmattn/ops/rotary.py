"""Rotary position embedding (arXiv 2104.09864), in the half-split layout that Llama-type checkpoints use.

Shapes: B batch, H heads, L length, D head_dim.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mmattn.errors import UsageError


def rotary_frequencies(head_dim: int, base: float = 10000.0, *, device: torch.device | str | None = None) -> Tensor:
    """Angular frequencies base^(-2i / D) for i < D / 2 (section 3.2.2 of the paper): float64 [D / 2].

    Raises:
        UsageError: if `head_dim` is odd or not positive, or `base` not positive.
    """
    if head_dim < 2 or head_dim % 2:
        raise UsageError(f"rotary positions: head_dim is {head_dim}, it must be even and positive")
    if not 0.0 < base < math.inf:
        raise UsageError(f"rotary positions: base is {base}, it must be a positive number")
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64, device=device) / head_dim
    return base**-exponents


def rotary_tables(
    positions: Tensor, frequencies: Tensor, *, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of position x frequency.

    Args:
        positions: integers [L] or [B, L].
        frequencies: [D / 2], see `rotary_frequencies`.
        dtype: of the tables. The angles themselves are taken in float64: in float32 they are off by 1e-3 at
            position 10,000, in bfloat16 they are useless.

    Returns:
        (cos, sin), each [1, 1, L, D / 2] or [B, 1, L, D / 2], ready to broadcast over heads.
    """
    if positions.dim() not in (1, 2):
        raise UsageError(f"rotary positions: positions have shape {list(positions.shape)}; use [L] or [B, L]")
    angles = positions.unsqueeze(-1).to(torch.float64) * frequencies.to(torch.float64)
    angles = angles[None, None] if positions.dim() == 1 else angles.unsqueeze(1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (x[i], x[i + D / 2]) of x [B, H, L, D] by the tables' angles; result in x's dtype (eq. 34)."""
    first, second = x.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def apply_rotary(x: Tensor, positions: Tensor, *, base: float = 10000.0) -> Tensor:
    """Rotary embedding of x [B, H, L, D] (queries or keys) at integer positions [L] or [B, L].

    Scores of rotated queries and keys depend only on the distance of their positions. Make the tables once with
    `rotary_tables` and use `rotate` where several layers share them.

    Raises:
        UsageError: if D is odd, or positions do not match x.
    """
    is_for_x = positions.dim() == 1 or positions.shape[0] == 1 or positions.shape[0] == x.shape[0]
    if positions.shape[-1] != x.shape[-2] or not is_for_x:
        raise UsageError(
            f"rotary positions: positions {list(positions.shape)} do not fit x {list(x.shape)}; use [L] or [B, L]"
        )
    table_dtype = torch.float64 if x.dtype is torch.float64 else torch.float32
    frequencies = rotary_frequencies(x.shape[-1], base, device=x.device)
    cos, sin = rotary_tables(positions, frequencies, dtype=table_dtype)
    return rotate(x, cos, sin)
