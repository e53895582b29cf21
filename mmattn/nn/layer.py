"""The transformer layer: self-attention, cross-attention and feed-forward, pre- or post-norm."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from mmattn.errors import UsageError
from mmattn.nn.cross_attention import CrossAttention
from mmattn.nn.feed_forward import ActivationName, FeedForward
from mmattn.nn.norms import NormKind, make_norm
from mmattn.nn.positions import RotaryEmbedding, RotaryTables
from mmattn.nn.self_attention import SelfAttention
from mmattn.ops.cache import ContextKV, KVCache


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
        dropout_p: Dropout on the output of each sublayer, in training only.
        attention_dropout_p: Dropout on the attention weights, in training only.
        activation_dropout_p: Dropout inside the feed-forward, in training only.
        qk_norm: "rms" or "layer" norm over D on queries and keys, or None.
        rotary: Rotary positions of the self-attention; one object may serve all layers.
        backend: Passed to `mmattn.attention`.

    Raises:
        UsageError: When the sizes do not divide, a norm or activation is unknown, or an option has nothing to act on.
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
        dropout_p: float = 0.0,
        attention_dropout_p: float = 0.0,
        activation_dropout_p: float = 0.0,
        qk_norm: NormKind | None = None,
        rotary: RotaryEmbedding | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if context_dim is not None and not has_cross_attention:
            raise UsageError("TransformerLayer: context_dim is given without has_cross_attention=True")
        if (is_causal or rotary is not None) and not has_self_attention:
            raise UsageError("TransformerLayer: is_causal and rotary need has_self_attention=True")
        self.norm_first = norm_first
        self.dropout_p = dropout_p
        self.self_attn: SelfAttention | None = None
        self.self_attn_norm: nn.Module | None = None
        if has_self_attention:
            self.self_attn = SelfAttention(
                embed_dim,
                num_heads,
                num_kv_heads=num_kv_heads,
                head_dim=head_dim,
                bias=bias,
                dropout_p=attention_dropout_p,
                is_causal=is_causal,
                qk_norm=qk_norm,
                rotary=rotary,
                backend=backend,
            )
            self.self_attn_norm = make_norm(norm, embed_dim, norm_eps)
        self.cross_attn: CrossAttention | None = None
        self.cross_attn_norm: nn.Module | None = None
        if has_cross_attention:
            self.cross_attn = CrossAttention(
                embed_dim,
                num_heads,
                context_dim=context_dim,
                num_kv_heads=num_kv_heads,
                head_dim=head_dim,
                bias=bias,
                dropout_p=attention_dropout_p,
                qk_norm=qk_norm,
                backend=backend,
            )
            self.cross_attn_norm = make_norm(norm, embed_dim, norm_eps)
        self.ffn = FeedForward(embed_dim, ffn_dim, activation=activation, dropout_p=activation_dropout_p, bias=bias)
        self.ffn_norm = make_norm(norm, embed_dim, norm_eps)

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
        cache: KVCache | None = None,
        positions: Tensor | RotaryTables | None = None,
    ) -> Tensor:
        """Run the layer.

        Args:
            x: `[B * n, L, C]`.
            attn_mask: Mask of the self-attention, as in `SelfAttention`.
            key_mask: Padding of the self-attention, `[B * n, Lk]`.
            context: `[B, Lk, Cc]`, or what `project_context` returned; row i of x looks at context row i // n.
            context_mask: Padding of the context, `[B, Lk]`.
            cache: Keys and values of the positions before.
            positions: Places for the rotary embedding, or its tables for them, as in `SelfAttention`.

        Returns:
            `[B * n, L, C]`.

        Raises:
            UsageError: On a wrong shape, or an argument for a sublayer that is not there.
        """
        if (context is None) != (self.cross_attn is None):
            which = "no context was given, but it has" if context is None else "a context was given, but it has no"
            raise UsageError(f"TransformerLayer: {which} cross-attention")
        # Locals: each look-up of a submodule goes through `nn.Module.__getattr__`, which decoding feels.
        self_attn, self_attn_norm = self.self_attn, self.self_attn_norm
        if self_attn is not None and self_attn_norm is not None:
            inputs = self_attn_norm(x) if self.norm_first else x
            out = self_attn(inputs, attn_mask=attn_mask, key_mask=key_mask, cache=cache, positions=positions)
            x = self._add(x, out, self_attn_norm)
        elif not all(argument is None for argument in (attn_mask, key_mask, cache, positions)):
            raise UsageError("TransformerLayer: attn_mask, key_mask, cache and positions need a self-attention")
        cross_attn, cross_attn_norm = self.cross_attn, self.cross_attn_norm
        if cross_attn is not None and cross_attn_norm is not None:
            inputs = cross_attn_norm(x) if self.norm_first else x
            x = self._add(x, cross_attn(inputs, context, key_mask=context_mask), cross_attn_norm)
        ffn_norm = self.ffn_norm
        out = self.ffn(ffn_norm(x) if self.norm_first else x)
        return self._add(x, out, ffn_norm)

    def _add(self, x: Tensor, out: Tensor, norm: nn.Module) -> Tensor:
        if self.training and self.dropout_p > 0:
            out = F.dropout(out, self.dropout_p)
        x = x + out
        return x if self.norm_first else norm(x)
