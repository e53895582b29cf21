"""Packed calls that the kernels for packed rows are held to, on the interpreter and on a card."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmattn.ops.packed import packed_attention
from mmattn.ops.segments import Segments
from tests.ops.cases import generator_for
from tests.tolerance import check_attention

# 1 to 37 rows, and one of 200 among short ones: blocks of 32, 64 and 128 rows straddle sequences, and end inside one.
MIXED = (1, 37, 2, 3, 11, 5, 29, 1, 1, 7, 13, 2, 19, 23, 17, 4, 31)
LONG_AMONG_SHORT = (3, 7, 200, 5, 11, 1)
# As many, of other lengths: of queries where those above are keys, and the other way round.
OTHERS = (5, 2, 41, 1, 1, 31, 7, 13, 3, 3, 29, 11, 2, 67, 1, 5, 19)
OTHERS_OF_LONG = (67, 1, 13, 2, 101, 3)


@dataclass(frozen=True)
class Packed:
    """Lengths of the sequences' queries and keys, heads, key/value heads, head_dim."""

    queries: tuple[int, ...]
    keys: tuple[int, ...]
    heads: int
    kv_heads: int
    head_dim: int

    def __str__(self) -> str:
        sizes = f"N{sum(self.queries)}-M{sum(self.keys)}-S{len(self.queries)}"
        return f"{sizes}-H{self.heads}-G{self.kv_heads}-D{self.head_dim}"

    def segments(self, device: str = "cpu") -> tuple[Segments, Segments]:
        """Of queries and of keys; the same where they are equal, as in self-attention."""
        queries = Segments.of(self.queries, device)
        return queries, queries if self.keys == self.queries else Segments.of(self.keys, device)

    def rows(self, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
        """Random query [N, H, D], key and value [M, G, D], drawn on the CPU."""
        generator = generator_for(sum(self.queries), self.head_dim, self.kv_heads)
        num_queries, num_keys = sum(self.queries), sum(self.keys)
        shapes = ((num_queries, self.heads), (num_keys, self.kv_heads), (num_keys, self.kv_heads))
        query, key, value = (torch.randn(*shape, self.head_dim, generator=generator) for shape in shapes)
        return query.to(device, dtype), key.to(device, dtype), value.to(device, dtype)

    def mask(self, is_causal: bool, device: str = "cpu") -> Tensor:
        """Boolean [N, M], block-diagonal, each block causal at its own end."""
        pairs = zip(self.queries, self.keys, strict=True)
        blocks = [torch.ones(q, k).tril(k - q) if is_causal else torch.ones(q, k) for q, k in pairs]
        return torch.block_diag(*blocks).bool().to(device)


def packed_call(
    case: Packed, is_causal: bool, backend: str = "triton_packed", device: str = "cpu"
) -> Callable[..., Tensor]:
    """`packed_attention` as `check_attention` calls a backend: a batch of one, and a mask that is eager's only."""
    queries, keys = case.segments(device)

    def run(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: Any) -> Tensor:
        rows = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
        output = packed_attention(*rows, queries, keys, is_causal=is_causal, backend=backend, **options)
        return output.transpose(0, 1)[None]

    return run


def check_packed(
    case: Packed,
    is_causal: bool,
    rows: tuple[Tensor, ...],
    backend: str = "triton_packed",
    **options: Any,
) -> dict[str, Tensor]:
    """Hold a packed call on `rows` to the float64 specification with a block-diagonal mask."""
    device = rows[0].device.type
    return check_attention(
        packed_call(case, is_causal, backend, device),
        *(tensor.transpose(0, 1)[None] for tensor in rows),
        attn_mask=case.mask(is_causal, device),
        what=f"{backend} {case} causal {is_causal}",
        **options,
    )
