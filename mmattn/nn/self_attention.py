"""Self-attention: a sequence attends to itself, or to its own past through a cache."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from mmattn.errors import UsageError
from mmattn.nn.names import OUR_ATTENTION, AttentionNames
from mmattn.nn.norms import NormKind
from mmattn.nn.positions import RotaryEmbedding, RotaryTables
from mmattn.nn.projected_attention import ProjectedAttention, split_heads
from mmattn.nn.shared_input import shared_input
from mmattn.ops.cache import KVCache
from mmattn.ops.masks import as_four_dim, sliding_window_mask
from mmattn.ops.rotary import rotate
from mmattn.ops.segments import Segments


class SelfAttention(ProjectedAttention):
    """Multi-head self-attention with separate `q_proj`, `k_proj`, `v_proj`, `out_proj` (arXiv 1706.03762).

    Args:
        embed_dim: C, width of input and output.
        num_heads: H.
        num_kv_heads: G, a divisor of H; H when None.
        head_dim: D; C / H when None.
        bias: Bias of the query, key and value projections.
        out_bias: Bias of the output projection; as `bias` when None.
        dropout_p: Dropout on the attention weights, in training only.
        is_causal: Whether a position sees only itself and those before it.
        qk_norm: "rms" or "layer" norm over D on queries and keys, or None.
        rotary: Rotary positions applied to queries and keys; one object may serve all layers.
        scale: Factor of the scores; D ** -0.5 when None.
        backend: Passed to `mmattn.attention`.
        names: Under which the Linears are registered.

    Raises:
        UsageError: When the sizes do not divide, or the rotary embedding is of another head size.
    """

    role: ClassVar[Literal["self", "cross"]] = "self"
    packed_parts: ClassVar[tuple[Literal["query", "key", "value"], ...]] = ("query", "key", "value")

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = True,
        out_bias: bool | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        qk_norm: NormKind | None = None,
        rotary: RotaryEmbedding | None = None,
        scale: float | None = None,
        backend: str = "auto",
        names: AttentionNames = OUR_ATTENTION,
    ) -> None:
        super().__init__(
            embed_dim,
            num_heads,
            context_dim=embed_dim,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            bias=bias,
            out_bias=out_bias,
            dropout_p=dropout_p,
            qk_norm=qk_norm,
            scale=scale,
            backend=backend,
            names=names,
        )
        if rotary is not None and rotary.head_dim != self.head_dim:
            raise UsageError(f"SelfAttention: rotary has head_dim {rotary.head_dim}, the heads have {self.head_dim}")
        self.is_causal = is_causal
        self.rotary = rotary

    def forward(
        self,
        x: Tensor,
        *,
        attn_mask: Tensor | None = None,
        key_mask: Tensor | None = None,
        cache: KVCache | None = None,
        positions: Tensor | RotaryTables | None = None,
        segments: Segments | None = None,
    ) -> Tensor:
        """Attend within x.

        Args:
            x: `[B, L, C]`; with a cache, the new positions only. With segments `[N, C]`.
            attn_mask: True = may attend, `[L, Lk]`, `[B, L, Lk]` or `[B, 1 or H, L, Lk]`; Lk counts the cached ones.
            key_mask: `[B, Lk]`, False where a key is padding.
            cache: Keys and values of the positions before; x's are appended to it.
            positions: Places for the rotary embedding, `[L]` or `[B, L]`, or its tables for them, made once for all
                layers; those that follow the cache when None.
            segments: The sequences that x holds one after the other, without padding; each attends to itself. There
                are no masks and no cache then, and positions are `[N]`, from 0 in each sequence when None.

        Returns:
            `[B, L, C]`, with segments `[N, C]`.

        Raises:
            UsageError: On a wrong shape, a full cache, a windowed cache without causality, positions without a
                rotary embedding, or masks or a cache with segments.
        """
        if segments is not None:
            self._check_packed(x, self.embed_dim, "x", segments, attn_mask=attn_mask, key_mask=key_mask, cache=cache)
            return self._forward_packed(x, segments, positions)
        self._check_input(x, self.embed_dim, "x")
        query, key, value = self._project(x)
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        if self.rotary is not None:
            if positions is None:
                start = 0 if cache is None else cache.position
                positions = torch.arange(start, start + query.shape[2], device=query.device)
            query, key = self._rotated(query, key, self._rotary_tables(positions, query.dtype))
        elif positions is not None:
            raise UsageError("SelfAttention: positions were given, but the module has no rotary embedding to use them")
        # A single newest query sees every cached key: causal without a mask.
        is_causal = self.is_causal and query.shape[2] > 1
        if cache is not None:
            key, value = cache.update(key, value)
            if cache.window is not None:
                attn_mask = self._windowed(attn_mask, query, key, cache.window)
        attended = self._attend(query, key, value, attn_mask=attn_mask, key_mask=key_mask, is_causal=is_causal)
        return self.out_proj(attended)

    def _forward_packed(self, x: Tensor, segments: Segments, positions: Tensor | RotaryTables | None) -> Tensor:
        x = shared_input(x, self.q_proj, self.k_proj, self.v_proj)
        query = self.q_proj(x).unflatten(1, (-1, self.head_dim))
        key, value = (linear(x).unflatten(1, (-1, self.head_dim)) for linear in (self.k_proj, self.v_proj))
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        if self.rotary is not None:
            tables = self._rotary_tables(segments.positions() if positions is None else positions, query.dtype)
            rotated = self._rotated(query.transpose(0, 1)[None], key.transpose(0, 1)[None], tables)
            query, key = (heads[0].transpose(0, 1) for heads in rotated)
        elif positions is not None:
            raise UsageError("SelfAttention: positions were given, but the module has no rotary embedding to use them")
        return self.out_proj(self._attend_packed(query, key, value, segments, segments, is_causal=self.is_causal))

    def _rotary_tables(self, positions: Tensor | RotaryTables, dtype: torch.dtype) -> RotaryTables:
        if not isinstance(positions, Tensor):
            if not isinstance(positions, tuple):
                raise UsageError(
                    f"SelfAttention: positions are a {type(positions).__name__}, they must be a tensor [L] or [B, L], "
                    "or the tables that RotaryEmbedding makes of one"
                )
            return positions
        assert self.rotary is not None  # who asks has checked
        return self.rotary(positions, torch.promote_types(dtype, torch.float32))

    def _rotated(self, query: Tensor, key: Tensor, tables: RotaryTables) -> tuple[Tensor, Tensor]:
        cos, sin = tables
        batch, _, length, _ = query.shape
        if cos.shape[2] != length or (cos.shape[0] != 1 and cos.shape[0] != batch):
            raise UsageError(
                f"SelfAttention: positions for [batch, length] = [{cos.shape[0]}, {cos.shape[2]}] do not fit x of "
                f"[{batch}, {length}]"
            )
        if torch.compiler.is_compiling():
            # Together: of two rotations of different sizes inductor made wrong values (torch 2.11, CUDA, float32,
            # grouped heads of size 20, with gradients; eager, and the same graph without inductor, were right).
            both = rotate(torch.cat((query, key), dim=1), cos, sin)
            query, key = both.split((query.shape[1], key.shape[1]), dim=1)
            return query, key
        return rotate(query, cos, sin), rotate(key, cos, sin)

    def _windowed(self, attn_mask: Tensor | None, query: Tensor, key: Tensor, window: int) -> Tensor | None:
        if not self.is_causal:
            raise UsageError("SelfAttention: a cache with a window needs is_causal=True")
        batch, heads, num_queries, _ = query.shape
        num_keys = key.shape[2]
        if num_queries == 1 or num_keys <= window:
            return attn_mask
        near = sliding_window_mask(num_queries, num_keys, window, device=query.device)
        if attn_mask is None:
            return near
        mask = as_four_dim(attn_mask, batch, heads, num_queries, num_keys)
        return mask & near if mask.dtype is torch.bool else mask.masked_fill(~near, float("-inf"))

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        packed = self._usable_packing()
        if packed is None:
            x = shared_input(x, self.q_proj, self.k_proj, self.v_proj)
            query = split_heads(self.q_proj(x), self.head_dim)
            return query, split_heads(self.k_proj(x), self.head_dim), split_heads(self.v_proj(x), self.head_dim)
        heads = split_heads(packed(x), self.head_dim)
        query, key, value = heads.split((self.num_heads, self.num_kv_heads, self.num_kv_heads), dim=1)
        return query, key, value
