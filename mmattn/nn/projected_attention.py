"""What self- and cross-attention share: sizes, projections, their packing for inference, the output.

Sizes: B batch, L or Lq queries, Lk keys, C channels, H query heads, G key/value heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal, Self, cast

import torch
from torch import Tensor, nn

from mmattn.errors import UsageError
from mmattn.nn.names import OUR_ATTENTION, AttentionNames, find, place
from mmattn.nn.norms import NormKind, make_norm
from mmattn.nn.packed_linears import PackedLinears, packing_refusals
from mmattn.ops.attention import attention
from mmattn.ops.packed import check_rows, packed_attention
from mmattn.ops.registry import check_name
from mmattn.ops.request import check_dropout, check_scale
from mmattn.ops.segments import Segments, check_segments


class ProjectedAttention(nn.Module):
    """Query, key, value and output Linears around `mmattn.attention`; base of `SelfAttention` and `CrossAttention`.

    Args:
        embed_dim: C, width of the queries' input and of the output.
        num_heads: H.
        context_dim: Width of the input of keys and values.
        num_kv_heads: G, a divisor of H (GQA, arXiv 2305.13245; 1 is MQA, arXiv 1911.02150); H when None.
        head_dim: D; C / H when None.
        bias: Bias of the query, key and value projections.
        out_bias: Bias of the output projection; as `bias` when None.
        dropout_p: Dropout on the attention weights, in training only.
        qk_norm: Norm over D on queries and keys, "rms" or "layer" (arXiv 2010.04245), or None.
        scale: Factor of the scores; D ** -0.5 when None.
        backend: Passed to `mmattn.attention`.
        names: Under which the Linears are registered. Whatever they are, `q_proj`, `k_proj`, `v_proj` and `out_proj`
            read them.

    Raises:
        UsageError: When the sizes do not divide, a number is out of range, or there is no such backend.
    """

    role: ClassVar[Literal["self", "cross"]]
    packed_parts: ClassVar[tuple[Literal["query", "key", "value"], ...]]

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        context_dim: int,
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
        super().__init__()
        kind = type(self).__name__
        sizes = {"embed_dim": embed_dim, "context_dim": context_dim, "num_heads": num_heads, "head_dim": head_dim}
        for name, size in sizes.items():
            if size is not None and size < 1:
                raise UsageError(f"{kind}: {name} is {size}, it must be at least 1")
        check_dropout(kind, "dropout_p", dropout_p)
        check_name(backend)
        if scale is not None:
            check_scale(kind, scale)
        if head_dim is None:
            if embed_dim % num_heads:
                raise UsageError(
                    f"{kind}: embed_dim {embed_dim} does not divide into num_heads {num_heads}: set head_dim"
                )
            head_dim = embed_dim // num_heads
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_kv_heads < 1 or num_heads % num_kv_heads:
            raise UsageError(f"{kind}: num_kv_heads {num_kv_heads} does not divide num_heads {num_heads}")
        self.embed_dim = embed_dim
        self.context_dim = context_dim
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.scale = scale
        self.dropout_p = dropout_p
        self.backend = backend
        self.names = names
        self._query_name, self._key_name, self._value_name = names.query, names.key, names.value
        self._out_path = tuple(names.out.split("."))
        setattr(self, names.query, nn.Linear(embed_dim, num_heads * head_dim, bias=bias))
        setattr(self, names.key, nn.Linear(context_dim, num_kv_heads * head_dim, bias=bias))
        setattr(self, names.value, nn.Linear(context_dim, num_kv_heads * head_dim, bias=bias))
        out_bias = bias if out_bias is None else out_bias
        place(self, self._out_path, nn.Linear(num_heads * head_dim, embed_dim, bias=out_bias))
        self.q_norm = None if qk_norm is None else make_norm(qk_norm, head_dim)
        self.k_norm = None if qk_norm is None else make_norm(qk_norm, head_dim)
        self._packed: PackedLinears | None = None

    @property
    def q_proj(self) -> nn.Linear:
        """The Linear of the queries, or what took its place (an adapter, a quantised weight)."""
        return self._modules[self._query_name]  # pyright: ignore[reportReturnType]

    @property
    def k_proj(self) -> nn.Linear:
        """The Linear of the keys, or what took its place."""
        return self._modules[self._key_name]  # pyright: ignore[reportReturnType]

    @property
    def v_proj(self) -> nn.Linear:
        """The Linear of the values, or what took its place."""
        return self._modules[self._value_name]  # pyright: ignore[reportReturnType]

    @property
    def out_proj(self) -> nn.Linear:
        """The Linear of the output, or what took its place."""
        return find(self, self._out_path)  # pyright: ignore[reportReturnType]

    @property
    def packed_names(self) -> tuple[str, ...]:
        """The names of the Linears that `fuse()` packs."""
        return tuple(getattr(self.names, part) for part in self.packed_parts)

    @property
    def is_fused(self) -> bool:
        """Whether the projections are packed into one product."""
        return self._packed is not None

    def fuse_refusals(self) -> list[str]:
        """Why `fuse()` would refuse now; empty when it would not."""
        reasons = ["it is in training mode (call eval() first)"] if self.training else []
        return reasons + packing_refusals(self._projections())

    def fuse(self) -> Self:
        """Pack the projections of one input into one product, for inference; `state_dict` stays as it is.

        The packing undoes itself on `train()`, on a replaced projection or weight and when a hook is added; while
        gradients of the weights are wanted the separate Linears run.

        Raises:
            UsageError: In training mode, or when a projection is not a plain Linear (adapter, quantised weight).
        """
        if self._packed is None:
            reasons = self.fuse_refusals()
            if reasons:
                raise UsageError(f"{type(self).__name__} cannot be fused: {'; '.join(reasons)}")
            self._packed = PackedLinears(cast("dict[str, nn.Linear]", self._projections()))
        return self

    @property
    def packed(self) -> PackedLinears | None:
        """The packed projections, None where they are not fused."""
        return self._packed

    def unfuse(self) -> Self:
        """Undo `fuse()`."""
        if self._packed is not None:
            self._packed.release()
            self._packed = None
        return self

    def train(self, mode: bool = True) -> Self:
        """As in torch; training mode undoes `fuse()`."""
        if mode:
            self.unfuse()
        return super().train(mode)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        # `.to()`, `.half()` and their like give every weight a new storage: pack again afterwards.
        packed = self._packed is not None
        self.unfuse()
        super()._apply(fn, recurse)
        if packed and not self.fuse_refusals():
            self.fuse()
        return self

    def _projections(self) -> dict[str, nn.Module | None]:
        return {name: self._modules.get(name) for name in self.packed_names}

    def _usable_packing(self) -> PackedLinears | None:
        packed = self._packed
        if packed is None:
            return None
        if not packed.is_current(self._modules):
            self.unfuse()
            return None
        if torch.is_grad_enabled() and packed.requires_grad():
            return None
        return packed

    def _check_input(self, x: Tensor, width: int, name: str) -> None:
        shape = getattr(x, "shape", ())
        if len(shape) != 3 or shape[2] != width:
            kind = type(self).__name__
            if not isinstance(x, Tensor):
                raise UsageError(f"{kind}: {name} is a {type(x).__name__}, not a tensor [batch, length, {width}]")
            raise UsageError(f"{kind}: {name} has shape {list(shape)}, expected [batch, length, {width}]")

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        attn_mask: Tensor | None,
        key_mask: Tensor | None,
        is_causal: bool,
    ) -> Tensor:
        """Attention over heads, then heads side by side: `[B, Lq, H * D]`."""
        out = attention(
            query,
            key,
            value,
            attn_mask=attn_mask,
            key_mask=key_mask,
            is_causal=is_causal,
            scale=self.scale,
            dropout_p=self.dropout_p if self.training else 0.0,
            backend=self.backend,
            role=self.role,
            caller=self,
        )
        return cast(Tensor, out).transpose(1, 2).flatten(2)

    def _check_packed(self, x: Tensor, width: int, name: str, segments: Segments, **unused: object) -> None:
        """Check rows of packed sequences, and that nothing is given which they take no notice of."""
        kind = type(self).__name__
        check_segments(kind, segments)
        given = [name for name, value in unused.items() if value is not None]
        if given:
            raise UsageError(f"{kind}: packed sequences (segments) take no {' or '.join(given)}")
        if x.dim() != 2 or x.shape[1] != width:
            raise UsageError(f"{kind}: {name} has shape {list(x.shape)}, expected packed rows [rows, {width}]")
        check_rows(kind, name, x, segments)

    def _attend_packed(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        query_segments: Segments,
        key_segments: Segments,
        *,
        is_causal: bool,
    ) -> Tensor:
        """Attention over heads `[N, H, D]` of packed sequences, then heads side by side: `[N, H * D]`."""
        return packed_attention(
            query,
            key,
            value,
            query_segments,
            key_segments,
            is_causal=is_causal,
            scale=self.scale,
            dropout_p=self.dropout_p if self.training else 0.0,
            backend=self.backend,
            role=self.role,
            caller=self,
        ).flatten(1)

    def extra_repr(self) -> str:
        """What `print(module)` adds."""
        text = f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, head_dim={self.head_dim}"
        return text + (", fused" if self.is_fused else "")


def split_heads(x: Tensor, head_dim: int) -> Tensor:
    """View `[B, L, N * D]` as `[B, N, L, D]`, without a copy.

    By the size of a head and not their number: with tensor parallelism a process has some of the heads.
    """
    batch, length, width = x.shape
    return x.reshape(batch, length, width // head_dim, head_dim).transpose(1, 2)
