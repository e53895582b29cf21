"""Positions: learned, sinusoidal and rotary. Each maps position numbers `[L]` or `[B, L]`."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmattn.errors import UsageError
from mmattn.ops.rotary import rotary_frequencies, rotary_tables

RotaryTables = tuple[Tensor, Tensor]


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
        try:
            return F.embedding(positions, self.weight)
        except IndexError as error:
            low, high = int(positions.min()), int(positions.max())
            raise UsageError(
                f"LearnedPositions: positions {low} to {high} were asked for, there are {self.max_length} "
                "(0 to max_length - 1): shorten the sequence"
            ) from error

    def extra_repr(self) -> str:
        """What `print(module)` adds."""
        return f"max_length={self.max_length}, embed_dim={self.embed_dim}"


class SinusoidalPositions(nn.Module):
    """Fixed sines and cosines (arXiv 1706.03762, section 3.5), all sines first, then all cosines, as Marian has them.

    Args:
        embed_dim: C; when odd there is one more sine than cosines.
    """

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.embed_dim = embed_dim

    def forward(self, positions: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Vectors `[..., C]` of positions `[...]`, made in float32 and returned as `dtype`."""
        steps = torch.arange(0, self.embed_dim, 2, device=positions.device, dtype=torch.float32)
        angles = positions.float().unsqueeze(-1) * torch.exp(steps * (-math.log(10000.0) / self.embed_dim))
        return torch.cat((angles.sin(), angles[..., : self.embed_dim // 2].cos()), dim=-1).to(dtype)

    def extra_repr(self) -> str:
        """What `print(module)` adds."""
        return f"embed_dim={self.embed_dim}"


class RotaryEmbedding(nn.Module):
    """Rotary positions (arXiv 2104.09864), in the half-split layout that Llama-type checkpoints use; no weights.

    Args:
        head_dim: D, even.
        base: Of the frequencies base^(-2i / D).

    Raises:
        UsageError: When D is odd.
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
