"""The text network: embeddings, transformer layers that may attend to a context, vocabulary head.

R rows (texts), B contexts (R = B * n, row i belongs to context i // n), L tokens, N tokens of all rows where they are
packed without padding, C channels, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from mmattn.errors import UsageError
from mmattn.models.decoding import LayerContexts
from mmattn.models.vlm.config import TextConfig
from mmattn.nn import (
    CrossAttention,
    GatedCrossAttention,
    LearnedPositions,
    RotaryEmbedding,
    SelfAttention,
    TransformerLayer,
)
from mmattn.nn.feed_forward import ActivationName
from mmattn.nn.vocabulary_head import VocabularyHead
from mmattn.ops.cache import ContextKV, KVCache
from mmattn.ops.segments import Segments
from mmattn.ops.static_cache import StaticKVCache


class TextEmbedding(nn.Module):
    """Word, plus learned position unless the layers rotate, then BERT's norm where the architecture has one."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.words = nn.Embedding(config.vocab_size, config.embed_dim, padding_idx=config.pad_token_id)
        is_learned = config.positions == "learned"
        self.positions = LearnedPositions(config.max_positions, config.embed_dim) if is_learned else None
        self.norm = nn.LayerNorm(config.embed_dim, eps=config.norm_eps) if config.embedding_norm else nn.Identity()
        self.dropout = nn.Dropout(config.dropout_p)

    def forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        """Token ids `[R, L]` at positions `[L]`, or `[N]` at `[N]`, to `[R, L, C]` or `[N, C]`."""
        hidden = self.words(input_ids)
        if self.positions is not None:
            hidden = hidden + self.positions(positions)
        return self.dropout(self.norm(hidden))


class TextLayers(nn.Module):
    """Embeddings and transformer layers: BLIP's text encoder, and the body of every text decoder.

    Args:
        config: sizes and form.
        context_dim: channels of the context that the cross-attention reads.
        is_causal: a token sees only itself and those before it (decoder).
    """

    def __init__(self, config: TextConfig, *, context_dim: int, is_causal: bool) -> None:
        super().__init__()
        self.max_positions = config.max_positions
        self.embedding = TextEmbedding(config)
        attending = [index for index in range(config.num_layers) if config.has_cross_attention(index)]
        self.layers = nn.ModuleList(
            _layer(config, context_dim if index in attending and not config.gated else None, is_causal)
            for index in range(config.num_layers)
        )
        self.gated = nn.ModuleDict(
            {str(index): _gated_block(config, context_dim) for index in attending if config.gated}
        )
        # Post-norm layers end in a norm already.
        self.norm = nn.LayerNorm(config.embed_dim, eps=config.norm_eps) if config.norm_first else nn.Identity()

    def project_context(self, context: Tensor, key_mask: Tensor | None = None) -> LayerContexts:
        """Keys and values of every layer, once per context.

        Args:
            context: `[B, Lk, Cc]`.
            key_mask: bool `[B, Lk]`, True = may be attended; None: all.
        """
        parts = self.context_attentions
        return tuple(None if part is None else part.project_context(context, key_mask) for part in parts)

    @property
    def context_attentions(self) -> list[CrossAttention | None]:
        """For each layer the attention that reads the context; None: it reads none."""
        cross = [cast(TransformerLayer, layer).cross_attn for layer in self.layers]
        gated = {int(index): cast(GatedCrossAttention, block).cross_attn for index, block in self.gated.items()}
        return [gated.get(index, attention) for index, attention in enumerate(cross)]

    def forward(
        self,
        input_ids: Tensor,
        contexts: LayerContexts | Tensor | None = None,
        *,
        context_mask: Tensor | None = None,
        key_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        caches: Sequence[KVCache] | Sequence[StaticKVCache] | None = None,
        segments: Segments | None = None,
    ) -> Tensor:
        """Run the layers.

        Args:
            input_ids: `[R, L]`; with `StaticKVCache`s L = 1; with segments `[N]`.
            contexts: what `project_context` gave, for B contexts (R = B * n); or these themselves, `[B, Lk, Cc]`, which
                each layer then projects itself; None leaves cross-attention out.
            context_mask: bool `[B, Lk]`, False at the padding of contexts that are not yet projected.
            key_mask: bool `[R, L]`, False at padding.
            attn_mask: bool `[L, Lk]`, what the self-attention may see besides what causality says.
            caches: a self-attention cache per layer; `input_ids` then continue what is cached.
            segments: the R texts that `input_ids` holds one after the other, without padding; no masks, no caches and
                no projected contexts then.

        Returns:
            Hidden states `[R, L, C]`, or `[N, C]`.

        Raises:
            UsageError: more tokens than the model has positions, or arguments that do not go with segments.
        """
        start = caches[0].position if caches else 0
        length = input_ids.shape[1] if segments is None else segments.longest
        is_known = not isinstance(start, Tensor)
        if is_known and start + length > self.max_positions:
            raise UsageError(
                f"{start + length} tokens, but this text model has {self.max_positions} positions:"
                " shorten the text or generate fewer tokens"
            )
        context_segments = None
        if segments is not None:
            positions = segments.positions()
            contexts, context_segments = _packed_contexts(contexts, context_mask)
            if context_segments is not None:
                # Here, not in the first layer, which may be a compiled one.
                for each in (segments.merged(len(context_segments)), context_segments):
                    each.row_numbers()
        elif isinstance(start, Tensor):
            positions = start
        else:
            positions = torch.arange(start, start + length, device=input_ids.device)
        hidden = self.embedding(input_ids, positions)
        for index, layer in enumerate(self.layers):
            context = self._context_of(index, contexts)
            cross: dict[str, Any] = {"context_mask": context_mask, "segments": segments}
            if context is not None:
                cross["context_segments"] = context_segments
            if context is not None and str(index) in self.gated:
                hidden, context = self.gated[str(index)](hidden, context, **cross), None
            options: dict[str, Any] = {"key_mask": key_mask, "attn_mask": attn_mask}
            options["cache"] = caches[index] if caches else None
            if not is_known and self.embedding.positions is None:  # only the device knows where the token stands
                options["positions"] = start
            if context is not None:
                hidden = layer(hidden, context=context, **cross, **options)
            elif layer.cross_attn is not None:
                hidden = _without_context(cast(TransformerLayer, layer), hidden, segments=segments, **options)
            else:
                hidden = layer(hidden, segments=segments, **options)
        return self.norm(hidden)

    def _context_of(self, index: int, contexts: LayerContexts | Tensor | None) -> Tensor | ContextKV | None:
        if not isinstance(contexts, Tensor):
            return None if contexts is None else contexts[index]
        attends = str(index) in self.gated or cast(TransformerLayer, self.layers[index]).cross_attn is not None
        return contexts if attends else None


def _packed_contexts(
    contexts: LayerContexts | Tensor | None, context_mask: Tensor | None
) -> tuple[Tensor | None, Segments | None]:
    """Contexts `[B, Lk, Cc]` as rows `[B * Lk, Cc]`, and where each lies."""
    if contexts is None:
        return None, None
    if not isinstance(contexts, Tensor) or context_mask is not None:
        raise UsageError("packed texts (segments) take their contexts as one tensor [B, Lk, C], and no context_mask")
    batch, length, _ = contexts.shape
    return contexts.flatten(0, 1), Segments.equal(batch, length, contexts.device)


def _without_context(layer: TransformerLayer, x: Tensor, **options: Any) -> Tensor:
    """The layer with its cross-attention left out, as BLIP's text encoder embeds a text on its own.

    `options` are the self-attention's.
    """
    attention, norm = cast(SelfAttention, layer.self_attn), cast(nn.Module, layer.self_attn_norm)
    x = layer._add(x, attention(norm(x) if layer.norm_first else x, **options), norm)
    return layer._add(x, layer.ffn(layer.ffn_norm(x) if layer.norm_first else x), layer.ffn_norm)


def _layer(config: TextConfig, context_dim: int | None, is_causal: bool) -> TransformerLayer:
    return TransformerLayer(
        config.embed_dim,
        config.num_heads,
        config.ffn_dim,
        num_kv_heads=config.num_kv_heads,
        has_cross_attention=context_dim is not None,
        context_dim=context_dim,
        is_causal=is_causal,
        norm_first=config.norm_first,
        norm_eps=config.norm_eps,
        activation=cast("ActivationName", config.activation),
        dropout_p=config.dropout_p,
        attention_dropout_p=config.attention_dropout_p,
        rotary=RotaryEmbedding(config.embed_dim // config.num_heads) if config.positions == "rotary" else None,
    )


def _gated_block(config: TextConfig, context_dim: int) -> GatedCrossAttention:
    return GatedCrossAttention(
        config.embed_dim,
        config.num_heads,
        config.ffn_dim,
        context_dim=context_dim,
        num_kv_heads=config.num_kv_heads,
        norm_eps=config.norm_eps,
        activation=cast("ActivationName", config.activation),
        attention_dropout_p=config.attention_dropout_p,
    )


class TextDecoder(nn.Module):
    """A causal text network that attends to a context: `TextLayers` under a `VocabularyHead`."""

    def __init__(self, config: TextConfig, *, context_dim: int) -> None:
        super().__init__()
        self.config = config
        self.body = TextLayers(config, context_dim=context_dim, is_causal=True)
        self.head = VocabularyHead(
            config.embed_dim,
            config.vocab_size,
            is_tied=config.tie_word_embeddings,
            transform=cast("ActivationName", config.activation) if config.head_transform else None,
            norm_eps=config.norm_eps,
            weight_std=config.initializer_range,
        )

    @property
    def layers(self) -> nn.ModuleList:
        """The transformer layers."""
        return self.body.layers

    @property
    def context_attentions(self) -> list[CrossAttention | None]:
        """See `TextLayers.context_attentions`."""
        return self.body.context_attentions

    @property
    def max_positions(self) -> int:
        """Most tokens of a text."""
        return self.config.max_positions

    def project_context(self, context: Tensor, key_mask: Tensor | None = None) -> LayerContexts:
        """See `TextLayers.project_context`."""
        return self.body.project_context(context, key_mask)

    def forward(
        self,
        input_ids: Tensor,
        contexts: LayerContexts | Tensor | None = None,
        *,
        context_mask: Tensor | None = None,
        key_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        caches: Sequence[KVCache] | Sequence[StaticKVCache] | None = None,
        segments: Segments | None = None,
    ) -> Tensor:
        """Hidden states `[R, L, C]`, or `[N, C]` of packed texts; see `TextLayers.forward`."""
        options: dict[str, Any] = {"context_mask": context_mask, "key_mask": key_mask, "segments": segments}
        options["attn_mask"] = attn_mask
        return self.body(input_ids, contexts, caches=caches, **options)

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states `[..., C]` to logits `[..., V]`."""
        return self.head(hidden, self.body.embedding.words.weight)


def init_text_weights(module: nn.Module, std: float) -> None:
    """Draw embedding tables from a normal of spread `std`, the padding row zero (the blocks draw their own)."""
    for part in module.modules():
        if isinstance(part, TextEmbedding):
            for name, parameter in part.named_parameters():
                if not name.startswith("norm"):
                    nn.init.normal_(parameter, std=std)
            if part.words.padding_idx is not None:
                nn.init.zeros_(part.words.weight[part.words.padding_idx])
