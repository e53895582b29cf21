"""Calls that the short-key kernels are held to, on the interpreter and on a card.

Keys and heads of every way of being cut into blocks, the smallest possible rest among them: the interpreter needs
about 50 ms a program, so each size comes up once and not with every other.
"""

from __future__ import annotations

import functools

import torch

from mmattn.ops.attention import attention
from tests.ops.cases import Shape

triton_attention = functools.partial(attention, backend="triton")

SHAPES = [
    Shape(1, 1, 1, 63, 77, 40),
    Shape(2, 2, 1, 1, 16, 80),
    Shape(1, 2, 2, 63, 1, 64),
    Shape(1, 1, 1, 1024, 76, 72),
    Shape(2, 1, 1, 63, 78, 80),
    Shape(1, 2, 2, 1, 128, 96),
    Shape(1, 1, 1, 63, 128, 128),
    Shape(1, 1, 1, 63, 257, 160),
    Shape(1, 1, 1, 63, 512, 64),
    Shape(1, 1, 1, 67, 77, 160),
    Shape(1, 3, 1, 17, 130, 160),
]
# Grouped heads, batch, and sizes that are neither a multiple of 16 nor of 16 bytes.
GROUPED = [Shape(2, 6, 2, 37, 77, 40), Shape(3, 5, 1, 13, 19, 23), Shape(1, 4, 2, 19, 131, 41)]
FEW_KEYS = Shape(2, 3, 3, 17, 29, 40)
MANY_KEYS = Shape(1, 2, 1, 17, 293, 23)


def poisoned(tensor: torch.Tensor, unused: torch.Tensor) -> torch.Tensor:
    """Keys or values [B, G, Lk, D] with NaN where `unused` [B, G, Lk]."""
    return tensor.masked_fill(unused.unsqueeze(-1), float("nan"))
