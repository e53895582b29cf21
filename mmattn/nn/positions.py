"""Positions: learned, sinusoidal and rotary. Each maps position numbers `[L]` or `[B, L]`."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmattn.errors import UsageError
from mmattn.kernels.plain import makes_fake_tensors
from mmattn.ops.rotary import rotary_frequencies, rotary_tables

RotaryTables = tuple[Tensor, Tensor]


def _rows(table: Tensor, positions: Tensor, kind: str) -> Tensor:
    try:
        return F.embedding(positions, table)
    except IndexError as error:
        low, high = int(positions.min()), int(positions.max())
        raise UsageError(_out_of_range(kind, low, high, table.shape[0])) from error


def _out_of_range(kind: str, low: int, high: int, count: int) -> str:
    return (
        f"{kind}: positions {low} to {high} were asked for, there are {count} (0 to max_length - 1): shorten the "
        "sequence"
    )


class LearnedPositions(nn.Module):
    """A learned vector for each position, in a `weight` of `[max_length, embed_dim]`.

    Args:
        max_length: Number of positions.
        embed_dim: C.
    """

    def __init__(self, max_length: int, embed_dim: int) -> None:
        super().__init__()
        self.max_length = max_length
        self.embed_dim = embed_dim
        self.weight = nn.Parameter(torch.randn(max_length, embed_dim))

    def forward(self, positions: Tensor) -> Tensor:
        """Vectors `[..., C]` of integer positions `[...]`.

        Raises:
            UsageError: When a position is negative or not below `max_length`, and the tensor is on a CPU; an
                accelerator reports it by its own assertion, since reading the numbers would stall it.
        """
        return _rows(self.weight, positions, type(self).__name__)

    def extra_repr(self) -> str:
        """What `print(module)` adds."""
        return f"max_length={self.max_length}, embed_dim={self.embed_dim}"


class SinusoidalPositions(nn.Module):
    """Fixed sines and cosines (arXiv 1706.03762, section 3.5), all sines first, then all cosines; no weights.

    Args:
        embed_dim: C; when odd there is one more sine than cosines.
        max_length: Number of positions.
        spacing: Of the frequencies: "paper", 10000^(-2i / C), as Marian has them, or "tensor2tensor",
            10000^(-i / (C / 2 - 1)), as fairseq and M2M100 have them (C even).

    Raises:
        UsageError: When the spacing is unknown, or C is odd for tensor2tensor.
    """

    def __init__(self, embed_dim: int, max_length: int, spacing: Literal["paper", "tensor2tensor"] = "paper") -> None:
        super().__init__()
        if spacing not in ("paper", "tensor2tensor"):
            raise UsageError(f"SinusoidalPositions: spacing {spacing!r} is unknown: use 'paper' or 'tensor2tensor'")
        if spacing == "tensor2tensor" and (embed_dim % 2 or embed_dim < 4):
            raise UsageError(f"SinusoidalPositions: tensor2tensor spacing needs an even embed_dim, not {embed_dim}")
        self.embed_dim = embed_dim
        self.max_length = max_length
        self.spacing = spacing
        # No buffer: it follows from the sizes, and a buffer would be lost on the meta device.
        self._table: Tensor | None = None

    def forward(self, positions: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Vectors `[..., C]` of positions `[...]`, as `dtype`.

        Raises:
            UsageError: When a position is not below `max_length`, on a CPU (see `LearnedPositions`).
        """
        return _rows(self._table_for(positions.device, dtype), positions, type(self).__name__)

    def span(self, start: int, length: int, *, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
        """Vectors `[length, C]` of the positions from `start` on: a view, without a look-up."""
        if start < 0 or start + length > self.max_length:
            raise UsageError(_out_of_range(type(self).__name__, start, start + length - 1, self.max_length))
        return self._table_for(device, dtype)[start : start + length]

    def _table_for(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        if makes_fake_tensors():
            return self._make().to(device=device, dtype=dtype)
        table = self._table
        if table is None or table.device != device or table.dtype != dtype:
            table = self._make().to(device=device, dtype=dtype)
            self._table = table
        return table

    def _make(self) -> Tensor:
        # Each in the precision in which the checkpoints of its kind had it when they were trained.
        with torch.device("cpu"), torch.inference_mode(False):
            half = self.embed_dim // 2
            if self.spacing == "tensor2tensor":
                frequencies = torch.exp(torch.arange(half).float() * -(math.log(10000.0) / (half - 1)))
                angles = torch.arange(self.max_length).float()[:, None] * frequencies
                return torch.cat((angles.sin(), angles.cos()), dim=1)
            steps = torch.arange(0, self.embed_dim, 2, dtype=torch.float64)
            angles = torch.arange(self.max_length, dtype=torch.float64)[:, None] / 10000.0 ** (steps / self.embed_dim)
            return torch.cat((angles.sin(), angles[:, :half].cos()), dim=1)

    def extra_repr(self) -> str:
        """What `print(module)` adds."""
        return f"embed_dim={self.embed_dim}, max_length={self.max_length}, spacing={self.spacing!r}"


class RotaryEmbedding(nn.Module):
    """Rotary positions (arXiv 2104.09864), in the half-split layout that Llama-type checkpoints use; no weights.

    Args:
        head_dim: D, even.
        base: Of the frequencies base^(-2i / D).

    Raises:
        UsageError: When D is odd, or the base not positive.
    """

    def __init__(self, head_dim: int, base: float = 10000.0) -> None:
        super().__init__()
        rotary_frequencies(head_dim, base)  # raises on an odd size here, not at the first call
        self.head_dim = head_dim
        self.base = base

    def forward(self, positions: Tensor, dtype: torch.dtype = torch.float32) -> RotaryTables:
        """Cosines and sines of positions `[L]` or `[B, L]`: each `[1 or B, 1, L, D / 2]` of `dtype`.

        Made once a step, they serve every layer: `SelfAttention` takes them as its `positions`.
        """
        # The frequencies are no buffer: `.half()` would round them.
        frequencies = rotary_frequencies(self.head_dim, self.base, device=positions.device)
        return rotary_tables(positions, frequencies, dtype=dtype)

    def extra_repr(self) -> str:
        """What `print(module)` adds."""
        return f"head_dim={self.head_dim}, base={self.base:g}"
