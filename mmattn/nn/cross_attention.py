"""Cross-attention: queries of one sequence attend to another, whose keys and values are projected once."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from mmattn.errors import UsageError
from mmattn.nn.absorbed_context import attend_absorbed, can_absorb, is_less_work
from mmattn.nn.names import OUR_ATTENTION, AttentionNames
from mmattn.nn.norms import NormKind
from mmattn.nn.projected_attention import ProjectedAttention, split_heads
from mmattn.nn.shared_input import shared_input
from mmattn.ops.cache import ContextKV
from mmattn.ops.observe import OBSERVERS, STEER
from mmattn.ops.registry import selected
from mmattn.ops.segments import Segments


class CrossAttention(ProjectedAttention):
    """Multi-head cross-attention with separate `q_proj`, `k_proj`, `v_proj`, `out_proj` (arXiv 1706.03762).

    It has neither causality nor rotary positions: places in two different sequences are not comparable.

    Args:
        embed_dim: C, width of the queries' input and of the output.
        num_heads: H.
        context_dim: Cc, width of the context; C when None.
        num_kv_heads: G, a divisor of H; H when None.
        head_dim: D; C / H when None.
        bias: Bias of the query, key and value projections.
        out_bias: Bias of the output projection; as `bias` when None.
        dropout_p: Dropout on the attention weights, in training only.
        qk_norm: "rms" or "layer" norm over D on queries and keys, or None.
        scale: Factor of the scores; D ** -0.5 when None.
        backend: Passed to `mmattn.attention`.
        names: Under which the Linears are registered.

    Raises:
        UsageError: When the sizes do not divide.
    """

    role: ClassVar[Literal["self", "cross"]] = "cross"
    packed_parts: ClassVar[tuple[Literal["query", "key", "value"], ...]] = ("key", "value")

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        context_dim: int | None = None,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = True,
        out_bias: bool | None = None,
        dropout_p: float = 0.0,
        qk_norm: NormKind | None = None,
        scale: float | None = None,
        backend: str = "auto",
        names: AttentionNames = OUR_ATTENTION,
    ) -> None:
        super().__init__(
            embed_dim,
            num_heads,
            context_dim=embed_dim if context_dim is None else context_dim,
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

    def project_context(self, context: Tensor, key_mask: Tensor | None = None) -> ContextKV:
        """Keys and values of a context, to be projected once and used by any number of queries.

        Args:
            context: `[B, Lk, Cc]`.
            key_mask: `[B, Lk]`, False where the context is padding.

        Raises:
            UsageError: On a wrong shape.
        """
        projected = self._project(context, key_mask)
        # Kept head by head, not as views of the products' rows: every later step reads all of it, on a CPU at 1 to 8
        # rows and 577 keys 1.2 to 2.5 times as fast.
        return replace(projected, key=projected.key.contiguous(), value=projected.value.contiguous())

    def forward(
        self,
        x: Tensor,
        context: Tensor | ContextKV,
        *,
        key_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        segments: Segments | None = None,
        context_segments: Segments | None = None,
    ) -> Tensor:
        """Attend from x to the context.

        x may have n times as many rows as the context (beams, several texts on one picture): row i attends to context
        row i // n. The n rows are folded into the query axis, so keys and values are neither repeated nor copied.

        Args:
            x: `[B * n, L, C]`.
            context: `[B, Lk, Cc]`, or what `project_context` returned.
            key_mask: `[B, Lk]`, False where the context is padding; combined by "and" with the context's own.
            attn_mask: True = may attend, `[L, Lk]`, `[B * n, L, Lk]` or `[B * n, 1 or H, L, Lk]`.
            segments: The sequences that x `[N, C]` holds one after the other, without padding.
            context_segments: Those of the context `[M, Cc]`; with B of them and B * n of x, sequence i of x attends to
                context i // n.

        Returns:
            `[B * n, L, C]`, with segments `[N, C]`. A row that may attend to nothing gets the output projection of
            zeros.

        Raises:
            UsageError: On a wrong shape, when the rows of x are no multiple of the context's, or masks, a projected
                context or one kind of segments alone with segments.
        """
        if segments is not None or context_segments is not None:
            return self._forward_packed(x, context, segments, context_segments, key_mask=key_mask, attn_mask=attn_mask)
        self._check_input(x, self.embed_dim, "x")
        if not isinstance(context, ContextKV):
            context, key_mask = self._project(context, key_mask), None
        rows, length, _ = x.shape
        batch = context.key.shape[0]
        if rows % batch if batch else rows:
            raise UsageError(
                f"CrossAttention: x has {rows} rows and the context {batch}: x needs a multiple of the context's rows"
            )
        query = self.q_proj(x)
        repeats = rows // batch if batch else 1
        if repeats != 1:
            query = query.reshape(batch, repeats * length, query.shape[2])
            if isinstance(attn_mask, Tensor):  # else `attention` says what it is
                num_heads = query.shape[2] // self.head_dim
                attn_mask = fold_attn_mask(attn_mask, batch, num_heads, length, context.length, repeats)
        query = split_heads(query, self.head_dim)
        if self.q_norm is not None:
            query = self.q_norm(query)
        context.note_query(query)
        attended = self._attend(
            query,
            context.key,
            context.value,
            attn_mask=attn_mask,
            key_mask=_both(context, key_mask),
            is_causal=False,
        )
        if repeats != 1:
            attended = attended.reshape(rows, length, attended.shape[2])
        return self.out_proj(attended)

    def _forward_packed(
        self,
        x: Tensor,
        context: Tensor | ContextKV,
        segments: Segments | None,
        context_segments: Segments | None,
        **masks: Tensor | None,
    ) -> Tensor:
        if segments is None or context_segments is None or isinstance(context, ContextKV):
            raise UsageError(
                "CrossAttention: packed sequences need segments, context_segments and the context's rows [M, Cc]"
            )
        self._check_packed(x, self.embed_dim, "x", segments, **masks)
        self._check_packed(context, self.context_dim, "context", context_segments)
        query = self.q_proj(x).unflatten(1, (-1, self.head_dim))
        queries = segments.merged(len(context_segments))
        if self._is_absorbed(query, context, queries, context_segments):
            rows = context.unflatten(0, (len(context_segments), -1))
            out = attend_absorbed(query, rows, self.k_proj, self.v_proj, queries, self.num_kv_heads, self.scale)
            return self.out_proj(out.flatten(1))
        context = shared_input(context, self.k_proj, self.v_proj)
        key, value = (linear(context).unflatten(1, (-1, self.head_dim)) for linear in (self.k_proj, self.v_proj))
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        return self.out_proj(self._attend_packed(query, key, value, queries, context_segments, is_causal=False))

    def _is_absorbed(self, query: Tensor, context: Tensor, queries: Segments, contexts: Segments) -> bool:
        """Whether the projections of keys and values go to the queries' side: less work, and nobody asked for more."""
        if torch.compiler.is_compiling() or self.k_norm is not None or (self.training and self.dropout_p > 0.0):
            return False
        if self.backend != "auto" or selected(self.role) != "auto" or OBSERVERS.get() or STEER.get() is not None:
            return False
        sizes = (self.num_heads, self.num_kv_heads, self.head_dim, self.context_dim)
        return can_absorb(self.k_proj, self.v_proj, query, context) and is_less_work(queries, contexts, *sizes)

    def _project(self, context: Tensor, key_mask: Tensor | None) -> ContextKV:
        self._check_input(context, self.context_dim, "context")
        packed = self._usable_packing()
        if packed is None:
            context = shared_input(context, self.k_proj, self.v_proj)
            key = split_heads(self.k_proj(context), self.head_dim)
            value = split_heads(self.v_proj(context), self.head_dim)
        else:
            key, value = split_heads(packed(context), self.head_dim).chunk(2, dim=1)
        if self.k_norm is not None:
            key = self.k_norm(key)
        return ContextKV(key, value, key_mask)


def _both(context: ContextKV, key_mask: Tensor | None) -> Tensor | None:
    """The context's own key mask and another, by "and"."""
    own = context.key_mask
    if own is None or key_mask is None:
        return key_mask if own is None else own
    if key_mask.dtype is not torch.bool or key_mask.shape != own.shape:
        raise UsageError(
            f"CrossAttention: key_mask is {key_mask.dtype} {list(key_mask.shape)}, it must be boolean [B, Lk] = "
            f"{list(own.shape)}, as the context's own"
        )
    return own & key_mask


def fold_attn_mask(
    attn_mask: Tensor, batch: int, num_heads: int, length: int, context_length: int, repeats: int
) -> Tensor:
    """The mask of folded rows: `[L, Lk]` to `[n * L, Lk]`, `[B * n, h, L, Lk]` to `[B, h, n * L, Lk]`.

    Args:
        attn_mask: Of rank 2, 3 or 4; an axis of size 1 stands for all of its places.
        batch: B.
        num_heads: H.
        length: L.
        context_length: Lk.
        repeats: n.

    Raises:
        UsageError: When an axis is neither 1 nor of these sizes.
    """
    shape, rows = list(attn_mask.shape), batch * repeats
    wanted = {
        2: [length, context_length],
        3: [rows, length, context_length],
        4: [rows, num_heads, length, context_length],
    }
    # Not `in (1, full)`: see `masks.as_four_dim`.
    if len(shape) not in wanted or any(
        size != 1 and size != full for size, full in zip(shape, wanted[len(shape)], strict=True)
    ):
        raise UsageError(
            f"CrossAttention: attn_mask has shape {shape}, expected {', '.join(map(str, wanted.values()))}, or 1 for "
            "an axis that broadcasts"
        )
    if len(shape) == 2 or shape[0] == 1:
        if shape[-2] == 1:
            return attn_mask
        return attn_mask.repeat(*[1] * (len(shape) - 2), repeats, 1)
    folded = attn_mask.expand(*shape[:-2], length, shape[-1]).unflatten(0, (batch, repeats))
    if len(shape) == 4:
        folded = folded.transpose(1, 2)
    return folded.flatten(-3, -2)
