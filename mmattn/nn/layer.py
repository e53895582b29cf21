"""The transformer layer: self-attention, cross-attention and feed-forward, pre- or post-norm."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from mmattn.errors import UsageError
from mmattn.nn.cross_attention import CrossAttention
from mmattn.nn.feed_forward import ActivationName, FeedForward
from mmattn.nn.names import OUR_LAYER, LayerNames
from mmattn.nn.norms import NormKind, make_norm
from mmattn.nn.positions import RotaryEmbedding, RotaryTables
from mmattn.nn.self_attention import SelfAttention
from mmattn.ops.cache import ContextKV, KVCache
from mmattn.ops.request import check_dropout
from mmattn.ops.segments import Segments


class TransformerLayer(nn.Module):
    """Self-attention, cross-attention and feed-forward, each with a residual and a norm.

    Pre-norm (`norm_first`, arXiv 2002.04745): `x + sublayer(norm(x))`. Post-norm (arXiv 1706.03762):
    `norm(x + sublayer(x))`. An encoder layer has no cross-attention; a decoder layer is causal.

    Args:
        embed_dim: C, width of input and output.
        num_heads: H.
        ffn_dim: Width inside the feed-forward.
        num_kv_heads: G of both attentions, a divisor of H; H when None.
        head_dim: D; C / H when None.
        has_self_attention: Whether there is a `self_attn`.
        has_cross_attention: Whether there is a `cross_attn`.
        context_dim: Width of the context; C when None.
        is_causal: Whether self-attention sees only the past.
        norm_first: Pre-norm or post-norm.
        norm: "layer" or "rms".
        norm_eps: Added to the variance in the norms.
        activation: Of the feed-forward.
        bias: Whether the Linears have a bias.
        attention_bias: Whether the query, key and value projections have one; as `bias` when None.
        dropout_p: Dropout on the output of each sublayer, in training only.
        ffn_dropout_p: The same for the feed-forward; as `dropout_p` when None.
        attention_dropout_p: Dropout on the attention weights, in training only.
        activation_dropout_p: Dropout inside the feed-forward, in training only.
        qk_norm: "rms" or "layer" norm over D on queries and keys, or None.
        rotary: Rotary positions of the self-attention; one object may serve all layers.
        backend: Passed to `mmattn.attention`.
        names: Under which the parts are registered. Whatever they are, `self_attn`, `self_attn_norm`, `cross_attn`,
            `cross_attn_norm`, `ffn` and `ffn_norm` read them.

    Raises:
        UsageError: When the sizes do not divide, a number is out of range, a norm, activation or backend is unknown, or
            an option has nothing to act on.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        ffn_dim: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        has_self_attention: bool = True,
        has_cross_attention: bool = False,
        context_dim: int | None = None,
        is_causal: bool = False,
        norm_first: bool = True,
        norm: NormKind = "layer",
        norm_eps: float = 1e-5,
        activation: ActivationName = "gelu",
        bias: bool = True,
        attention_bias: bool | None = None,
        dropout_p: float = 0.0,
        ffn_dropout_p: float | None = None,
        attention_dropout_p: float = 0.0,
        activation_dropout_p: float = 0.0,
        qk_norm: NormKind | None = None,
        rotary: RotaryEmbedding | None = None,
        backend: str = "auto",
        names: LayerNames = OUR_LAYER,
    ) -> None:
        super().__init__()
        if context_dim is not None and not has_cross_attention:
            raise UsageError("TransformerLayer: context_dim is given without has_cross_attention=True")
        if (is_causal or rotary is not None) and not has_self_attention:
            raise UsageError("TransformerLayer: is_causal and rotary need has_self_attention=True")
        self.norm_first = norm_first
        self.dropout_p = dropout_p
        self.ffn_dropout_p = dropout_p if ffn_dropout_p is None else ffn_dropout_p
        for name in ("dropout_p", "ffn_dropout_p"):
            check_dropout("TransformerLayer", name, getattr(self, name), may_drop_all=True)
        self.names = names
        attention: dict[str, Any] = {
            "num_kv_heads": num_kv_heads,
            "head_dim": head_dim,
            "bias": bias if attention_bias is None else attention_bias,
            "out_bias": bias,
            "dropout_p": attention_dropout_p,
            "qk_norm": qk_norm,
            "backend": backend,
            "names": names.attention,
        }
        if has_self_attention:
            self_attn = SelfAttention(embed_dim, num_heads, is_causal=is_causal, rotary=rotary, **attention)
            setattr(self, names.self_attn, self_attn)
            setattr(self, names.self_attn_norm, make_norm(norm, embed_dim, norm_eps))
        if has_cross_attention:
            cross_attn = CrossAttention(embed_dim, num_heads, context_dim=context_dim, **attention)
            setattr(self, names.cross_attn, cross_attn)
            setattr(self, names.cross_attn_norm, make_norm(norm, embed_dim, norm_eps))
        options: dict[str, Any] = {"dropout_p": activation_dropout_p, "bias": bias, "names": names.feed_forward}
        setattr(self, names.ffn, FeedForward(embed_dim, ffn_dim, activation=activation, **options))
        setattr(self, names.ffn_norm, make_norm(norm, embed_dim, norm_eps))

    # Straight from the table of submodules, past `nn.Module.__getattr__`, which decoding feels.

    @property
    def self_attn(self) -> SelfAttention | None:
        """The self-attention, None without one."""
        return self._modules.get(self.names.self_attn)  # pyright: ignore[reportReturnType]

    @property
    def self_attn_norm(self) -> nn.Module | None:
        """The norm of the self-attention, None without one."""
        return self._modules.get(self.names.self_attn_norm)

    @property
    def cross_attn(self) -> CrossAttention | None:
        """The cross-attention, None without one."""
        return self._modules.get(self.names.cross_attn)  # pyright: ignore[reportReturnType]

    @property
    def cross_attn_norm(self) -> nn.Module | None:
        """The norm of the cross-attention, None without one."""
        return self._modules.get(self.names.cross_attn_norm)

    @property
    def ffn(self) -> FeedForward:
        """The feed-forward block."""
        return self._modules[self.names.ffn]  # pyright: ignore[reportReturnType]

    @property
    def ffn_norm(self) -> nn.Module:
        """The norm of the feed-forward."""
        return self._modules[self.names.ffn_norm]  # pyright: ignore[reportReturnType]

    def project_context(self, context: Tensor, key_mask: Tensor | None = None) -> ContextKV:
        """As `CrossAttention.project_context`.

        Raises:
            UsageError: When the layer has no cross-attention.
        """
        if self.cross_attn is None:
            raise UsageError("TransformerLayer: a context was given, but the layer has no cross-attention")
        return self.cross_attn.project_context(context, key_mask)

    def forward(
        self,
        x: Tensor,
        *,
        attn_mask: Tensor | None = None,
        key_mask: Tensor | None = None,
        context: Tensor | ContextKV | None = None,
        context_mask: Tensor | None = None,
        context_attn_mask: Tensor | None = None,
        cache: KVCache | None = None,
        positions: Tensor | RotaryTables | None = None,
        segments: Segments | None = None,
        context_segments: Segments | None = None,
    ) -> Tensor:
        """Run the layer.

        Args:
            x: `[B * n, L, C]`; with segments `[N, C]`.
            attn_mask: Mask of the self-attention, as in `SelfAttention`.
            key_mask: Padding of the self-attention, `[B * n, Lk]`.
            context: `[B, Lk, Cc]`, or what `project_context` returned; row i of x looks at context row i // n.
            context_mask: Padding of the context, `[B, Lk]`.
            context_attn_mask: Mask of the cross-attention, as `attn_mask` in `CrossAttention`.
            cache: Keys and values of the positions before.
            positions: Places for the rotary embedding, or its tables for them, as in `SelfAttention`.
            segments: The sequences that x holds one after the other, without padding; no masks and no cache then.
            context_segments: Those of the context, `[M, Cc]` and not projected, as in `CrossAttention`.

        Returns:
            As x.

        Raises:
            UsageError: On a wrong shape, or an argument for a sublayer that is not there.
        """
        if (context is None) != (self.cross_attn is None):
            which = "no context was given, but it has" if context is None else "a context was given, but it has no"
            raise UsageError(f"TransformerLayer: {which} cross-attention")
        self_attn, self_attn_norm = self.self_attn, self.self_attn_norm
        if self_attn is not None and self_attn_norm is not None:
            inputs = self_attn_norm(x) if self.norm_first else x
            out = self_attn(
                inputs, attn_mask=attn_mask, key_mask=key_mask, cache=cache, positions=positions, segments=segments
            )
            x = self._add(x, out, self_attn_norm)
        elif not all(argument is None for argument in (attn_mask, key_mask, cache, positions)):
            raise UsageError("TransformerLayer: attn_mask, key_mask, cache and positions need a self-attention")
        cross_attn, cross_attn_norm = self.cross_attn, self.cross_attn_norm
        if cross_attn is not None and cross_attn_norm is not None:
            inputs = cross_attn_norm(x) if self.norm_first else x
            out = cross_attn(
                inputs,
                context,
                key_mask=context_mask,
                attn_mask=context_attn_mask,
                segments=segments,
                context_segments=context_segments,
            )
            x = self._add(x, out, cross_attn_norm)
        elif not all(argument is None for argument in (context_mask, context_attn_mask, context_segments)):
            raise UsageError(
                "TransformerLayer: context_mask, context_attn_mask and context_segments need a cross-attention"
            )
        ffn_norm = self.ffn_norm
        out = self.ffn(ffn_norm(x) if self.norm_first else x)
        return self._add(x, out, ffn_norm, self.ffn_dropout_p)

    def _add(self, x: Tensor, out: Tensor, norm: nn.Module, dropout_p: float | None = None) -> Tensor:
        dropout_p = self.dropout_p if dropout_p is None else dropout_p
        if self.training and dropout_p > 0:
            out = F.dropout(out, dropout_p)
        # In this order: a sum is laid out as its first term, and x may be a transposed picture, which norms would copy.
        x = out + x
        return x if self.norm_first else norm(x)
