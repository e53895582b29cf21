"""Inputs for attention tests: one grid of shapes, one of masks. Every size is a different prime where it can be."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

INF = float("inf")


@dataclass(frozen=True)
class Shape:
    """Sizes of one call: batch, query heads, key/value heads, queries, keys, head_dim."""

    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    head_dim: int

    def __str__(self) -> str:
        return f"B{self.batch}-H{self.heads}-G{self.kv_heads}-Lq{self.queries}-Lk{self.keys}-D{self.head_dim}"


SHAPES = [
    Shape(2, 3, 3, 7, 11, 5),
    Shape(3, 2, 2, 13, 13, 17),
    Shape(5, 6, 2, 1, 19, 23),
    Shape(2, 6, 3, 11, 11, 7),
    Shape(3, 5, 1, 13, 7, 19),
    Shape(2, 4, 2, 1, 1, 3),
    Shape(2, 2, 1, 37, 67, 41),
    Shape(1, 7, 7, 17, 1, 40),
]

KEY_MASKS = ("none", "right", "left", "gaps", "equal", "all", "nothing")
ATTN_MASKS = ("none", "boolean", "boolean-batch", "boolean-heads", "bias", "bias-heads", "empty-rows")


def mask_cases(shift: int, every: int) -> Iterator[tuple[str, str, bool]]:
    """Combinations of attention mask, key mask and causality: one in `every`, others for each `shift`."""
    for a, attn_kind in enumerate(ATTN_MASKS):
        for k, key_kind in enumerate(KEY_MASKS):
            for is_causal in (False, True):
                if (a + 2 * k + 3 * is_causal + shift) % every == 0:
                    yield attn_kind, key_kind, is_causal


def generator_for(*numbers: int) -> torch.Generator:
    """A generator of its own for a case, so that cases do not depend on their order."""
    seed = 7
    for number in numbers:
        seed = (seed * 1_000_003 + number) % (2**31 - 1)
    return torch.Generator().manual_seed(seed)


def make_inputs(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value with standard normal elements."""

    def draw(heads: int, length: int) -> Tensor:
        return torch.randn(shape.batch, heads, length, shape.head_dim, generator=generator).to(dtype)

    return draw(shape.heads, shape.queries), draw(shape.kv_heads, shape.keys), draw(shape.kv_heads, shape.keys)


def make_key_mask(kind: str, shape: Shape, generator: torch.Generator) -> Tensor | None:
    """A key mask [B, Lk] of the named kind; "nothing" leaves one row without a key, "all" leaves every row without."""
    batch, keys = shape.batch, shape.keys
    if kind == "none":
        return None
    places = torch.arange(keys)
    lengths = torch.randint(1, keys + 1, (batch, 1), generator=generator)
    if kind == "right":
        return places < lengths
    if kind == "left":
        return places >= keys - lengths
    if kind == "gaps":
        return torch.rand(batch, keys, generator=generator) < 0.6
    if kind == "equal":
        return (places < max(1, keys // 2)).expand(batch, keys)
    if kind == "all":
        return torch.zeros(batch, keys, dtype=torch.bool)
    mask = places < lengths
    mask[batch // 2] = False
    return mask


def make_attn_mask(kind: str, shape: Shape, generator: torch.Generator) -> Tensor | None:
    """An `attn_mask` of the named kind: boolean or float bias, of rank 2, 3 or 4."""
    batch, heads, queries, keys = shape.batch, shape.heads, shape.queries, shape.keys
    if kind == "none":
        return None
    if kind == "boolean":
        return torch.rand(queries, keys, generator=generator) < 0.7
    if kind == "boolean-batch":
        return torch.rand(batch, queries, keys, generator=generator) < 0.7
    if kind == "boolean-heads":
        return torch.rand(1, heads, queries, keys, generator=generator) < 0.7
    if kind == "bias":
        return torch.randn(queries, keys, generator=generator)
    if kind == "bias-heads":
        hidden = torch.rand(batch, heads, queries, keys, generator=generator) < 0.3
        return torch.randn(batch, heads, queries, keys, generator=generator).masked_fill(hidden, -INF)
    mask = torch.rand(queries, keys, generator=generator) < 0.8
    mask[queries // 2] = False
    return mask


def allowed_everywhere(
    shape: Shape, attn_mask: Tensor | None, key_mask: Tensor | None, is_causal: bool = False
) -> Tensor:
    """Who may attend to whom, written out from the definitions: boolean [B, H, Lq, Lk]."""
    allowed = torch.ones(shape.batch, shape.heads, shape.queries, shape.keys, dtype=torch.bool)
    if attn_mask is not None:
        four = attn_mask.unsqueeze(1) if attn_mask.dim() == 3 else attn_mask
        allowed = allowed & (four if four.dtype is torch.bool else four > -INF)
    if key_mask is not None:
        allowed = allowed & key_mask[:, None, None, :]
    if is_causal:
        for query in range(shape.queries):
            allowed[:, :, query, max(0, query + shape.keys - shape.queries + 1) :] = False
    return allowed


def used_by_anyone(shape: Shape, allowed: Tensor) -> Tensor:
    """Keys that some query of their row and key/value head may attend to: boolean [B, G, Lk]."""
    grouped = allowed.unflatten(1, (shape.kv_heads, shape.heads // shape.kv_heads))
    return grouped.any(dim=2).any(dim=2)
