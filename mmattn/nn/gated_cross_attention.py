"""Gated cross-attention: lets a finished text model look at a context without disturbing it at the start."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmattn.nn.cross_attention import CrossAttention
from mmattn.nn.feed_forward import ActivationName, FeedForward
from mmattn.nn.norms import NormKind, make_norm
from mmattn.ops.cache import ContextKV
from mmattn.ops.segments import Segments


class GatedCrossAttention(nn.Module):
    """The gated block of Flamingo (arXiv 2204.14198, section 3.1.2): cross-attention, then feed-forward, tanh-gated.

    `x + tanh(attn_gate) * cross_attn(cross_attn_norm(x), context)`, then `x + tanh(ffn_gate) * ffn(ffn_norm(x))`.
    Both gates start at 0, where the block gives back its input.

    Args:
        embed_dim: C, width of input and output.
        num_heads: H.
        ffn_dim: Width inside the feed-forward.
        context_dim: Width of the context; C when None.
        num_kv_heads: G, a divisor of H; H when None.
        head_dim: D; C / H when None.
        norm: "layer" or "rms".
        norm_eps: Added to the variance in the norms.
        activation: Of the feed-forward.
        bias: Whether the Linears have a bias.
        attention_dropout_p: Dropout on the attention weights, in training only.
        qk_norm: "rms" or "layer" norm over D on queries and keys, or None.
        backend: Passed to `mmattn.attention`.

    Raises:
        UsageError: When the sizes do not divide, or a norm or activation is unknown.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        ffn_dim: int,
        *,
        context_dim: int | None = None,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        norm: NormKind = "layer",
        norm_eps: float = 1e-5,
        activation: ActivationName = "gelu",
        bias: bool = True,
        attention_dropout_p: float = 0.0,
        qk_norm: NormKind | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.cross_attn_norm = make_norm(norm, embed_dim, norm_eps)
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
        self.ffn_norm = make_norm(norm, embed_dim, norm_eps)
        self.ffn = FeedForward(embed_dim, ffn_dim, activation=activation, bias=bias)
        # One element rather than rank 0, which sharded training (FSDP) does not take.
        self.attn_gate = nn.Parameter(torch.zeros(1))
        self.ffn_gate = nn.Parameter(torch.zeros(1))

    def project_context(self, context: Tensor, key_mask: Tensor | None = None) -> ContextKV:
        """As `CrossAttention.project_context`."""
        return self.cross_attn.project_context(context, key_mask)

    def forward(
        self,
        x: Tensor,
        context: Tensor | ContextKV,
        *,
        context_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        segments: Segments | None = None,
        context_segments: Segments | None = None,
    ) -> Tensor:
        """Add what the context says to x.

        Args:
            x: `[B * n, L, C]`; row i looks at context row i // n.
            context: `[B, Lk, Cc]`, or what `project_context` returned.
            context_mask: `[B, Lk]`, False where the context is padding.
            attn_mask: True = may attend, as in `CrossAttention`.
            segments: The sequences that x `[N, C]` holds without padding, as in `CrossAttention`.
            context_segments: Those of the context `[M, Cc]`.

        Returns:
            As x.

        Raises:
            UsageError: On a wrong shape.
        """
        attended = self.cross_attn(
            self.cross_attn_norm(x),
            context,
            key_mask=context_mask,
            attn_mask=attn_mask,
            segments=segments,
            context_segments=context_segments,
        )
        x = x + self.attn_gate.tanh() * attended
        return x + self.ffn_gate.tanh() * self.ffn(self.ffn_norm(x))
