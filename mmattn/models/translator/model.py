"""The encoder-decoder translation network.

B source sentences of Ls tokens, R = B * n target rows (row i belongs to sentence i // n) of Lt tokens, C channels,
V target vocabulary. Architecture: arXiv 1706.03762.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from mmattn.errors import UsageError
from mmattn.models.decoding import LayerContexts
from mmattn.models.scoring import TextOutput, score_labels
from mmattn.models.translator.alignment import AlignmentReader, alignment_loss
from mmattn.models.translator.config import TranslatorConfig
from mmattn.models.translator.state import TranslationState
from mmattn.nn import CrossAttention, LearnedPositions, RotaryEmbedding, SinusoidalPositions, TransformerLayer
from mmattn.nn.feed_forward import ActivationName
from mmattn.nn.vocabulary_head import VocabularyHead
from mmattn.ops.cache import KVCache
from mmattn.ops.segments import Segments
from mmattn.ops.static_cache import StaticKVCache


@dataclass(frozen=True)
class TranslationOutput(TextOutput):
    """A `TextOutput`, and the guided-alignment loss where gold alignments were given.

    Attributes:
        alignment_sum: sum over the aligned target tokens, a scalar with gradient.
        num_aligned: how many there are, an int64 scalar.
    """

    alignment_sum: Tensor | None = None
    num_aligned: Tensor | None = None


class Embedding(nn.Module):
    """Token vectors plus positions. The table of tokens may be another module's, handed in at each call."""

    def __init__(self, config: TranslatorConfig, vocab_size: int | None) -> None:
        super().__init__()
        self.scale = math.sqrt(config.embed_dim) if config.scale_embedding else 1.0
        self.offset = config.position_offset
        self.pads_have_positions = config.positions != "tensor2tensor"
        self.pad_token_id = config.pad_token_id
        self.words = None if vocab_size is None else nn.Embedding(vocab_size, config.embed_dim, config.pad_token_id)
        self.positions = _positions(config)
        self.dropout = nn.Dropout(config.dropout_p)

    def forward(
        self,
        input_ids: Tensor,
        start: int | Tensor,
        words: Tensor,
        key_mask: Tensor | None = None,
        segments: Segments | None = None,
    ) -> Tensor:
        """`[R, L]` token ids, the first at position `start`, and the table `[V, C]`, to `[R, L, C]`.

        A tensor `[1]` is the position of a single token, which only the device knows. Of packed sequences, `[N]` to
        `[N, C]`, each begins at `start`.
        """
        hidden = nn.functional.embedding(input_ids, words, self.pad_token_id) * self.scale
        table = self.positions
        if segments is not None:
            numbers = segments.positions() + (start + self.offset)
            if isinstance(table, LearnedPositions):
                hidden = hidden + table(numbers)
            elif isinstance(table, SinusoidalPositions):
                hidden = hidden + table(numbers, hidden.dtype)
            return self.dropout(hidden)
        first, length = start + self.offset, input_ids.shape[1]
        if isinstance(table, LearnedPositions):
            is_known = not isinstance(first, Tensor)
            hidden = hidden + table(torch.arange(first, first + length, device=input_ids.device) if is_known else first)
        elif isinstance(table, SinusoidalPositions):
            if isinstance(first, Tensor):
                hidden = hidden + table(first, hidden.dtype)
            elif self.pads_have_positions or key_mask is None:
                hidden = hidden + table.span(first, length, device=hidden.device, dtype=hidden.dtype)
            else:
                # As fairseq counts: padding has no position, wherever it stands.
                numbers = (key_mask.long().cumsum(dim=1) - 1 + first) * key_mask
                hidden = hidden + table(numbers, hidden.dtype) * key_mask[..., None]
        return self.dropout(hidden)


def _positions(config: TranslatorConfig) -> nn.Module | None:
    count = config.max_positions + config.position_offset
    if config.positions == "learned":
        return LearnedPositions(count, config.embed_dim)
    if config.positions == "rotary":
        return None
    spacing = "tensor2tensor" if config.positions == "tensor2tensor" else "paper"
    return SinusoidalPositions(config.embed_dim, count, spacing)


class Encoder(nn.Module):
    """Source tokens to states."""

    def __init__(self, config: TranslatorConfig) -> None:
        super().__init__()
        self.max_positions = config.max_positions
        self.embedding = Embedding(config, None if config.shares_embedding else config.vocab_size)
        self.layers = nn.ModuleList(_layer(config, is_decoder=False) for _ in range(config.encoder_layers))
        self.norm = _final_norm(config)

    def forward(
        self,
        input_ids: Tensor,
        key_mask: Tensor | None,
        shared_words: Tensor,
        segments: Segments | None = None,
    ) -> Tensor:
        """`[B, Ls]` and its mask `[B, Ls]` (False: padding) to `[B, Ls, C]`; packed sequences `[N]` to `[N, C]`."""
        longest = input_ids.shape[1] if segments is None else segments.longest
        if longest > self.max_positions:
            raise UsageError(
                f"a source of {longest} tokens, but this model has {self.max_positions} positions: split it"
            )
        own = self.embedding.words
        hidden = self.embedding(input_ids, 0, shared_words if own is None else own.weight, key_mask, segments)
        for layer in self.layers:
            hidden = layer(hidden, key_mask=key_mask, segments=segments)
        return self.norm(hidden)


class Decoder(nn.Module):
    """Target tokens to states and scores, attending to the source; a `StepDecoder`. Its embedding may be shared."""

    def __init__(self, config: TranslatorConfig) -> None:
        super().__init__()
        self.max_positions = config.max_positions
        self.is_rotary = config.positions == "rotary"
        self.embedding = Embedding(config, config.output_size)
        self.layers = nn.ModuleList(_layer(config, is_decoder=True) for _ in range(config.decoder_layers))
        self.norm = _final_norm(config)
        self.head = VocabularyHead(
            config.embed_dim,
            config.output_size,
            is_tied=config.tie_word_embeddings,
            bias="fixed" if config.logits_bias else None,
            weight_std=config.embed_dim**-0.5,
        )

    @property
    def context_attentions(self) -> list[CrossAttention | None]:
        """For each layer the attention that reads the source."""
        return [cast(TransformerLayer, layer).cross_attn for layer in self.layers]

    @property
    def words(self) -> Tensor:
        """The table of tokens, `[V, C]`."""
        return cast(nn.Embedding, self.embedding.words).weight

    def project_context(self, states: Tensor, key_mask: Tensor | None = None) -> LayerContexts:
        """Keys and values of every layer, once per source: states `[B, Ls, C]`, mask bool `[B, Ls]`."""
        return tuple(cast(TransformerLayer, layer).project_context(states, key_mask) for layer in self.layers)

    def forward(
        self,
        input_ids: Tensor,
        contexts: LayerContexts | Tensor | None = None,
        *,
        context_mask: Tensor | None = None,
        caches: Sequence[KVCache] | Sequence[StaticKVCache] | None = None,
        attn_mask: Tensor | None = None,
        segments: Segments | None = None,
        context_segments: Segments | None = None,
    ) -> Tensor:
        """Run the layers.

        Args:
            input_ids: `[R, L]`; with `StaticKVCache`s L = 1. Of packed sequences `[N]`.
            contexts: what `project_context` gave for B sources (R = B * n); or their states `[B, Ls, C]`, which each
                layer then projects itself.
            context_mask: bool `[B, Ls]`, False at the padding of states.
            caches: a self-attention cache per layer; `input_ids` then continue what is cached.
            attn_mask: bool `[L, Lk]`, what the self-attention may see besides what causality says.
            segments: the sequences that `input_ids` holds one after the other, without padding.
            context_segments: as many of the states, which are `[M, C]` then.

        Returns:
            Hidden states `[R, L, C]`, of packed sequences `[N, C]`.

        Raises:
            UsageError: no contexts, or more tokens than the model has positions.
        """
        if contexts is None:
            raise UsageError("the decoder needs the contexts that project_context() returns")
        start = caches[0].position if caches else 0
        is_known = not isinstance(start, Tensor)
        length = input_ids.shape[1] if segments is None else segments.longest
        if is_known and start + length > self.max_positions:
            raise UsageError(
                f"{start + length} target tokens, but this model has {self.max_positions} positions: "
                "generate fewer tokens"
            )
        hidden = self.embedding(input_ids, start, self.words, segments=segments)
        positions = start if self.is_rotary and not is_known else None
        for index, layer in enumerate(self.layers):
            cache = caches[index] if caches else None
            context = contexts if isinstance(contexts, Tensor) else contexts[index]
            hidden = layer(
                hidden,
                attn_mask=attn_mask,
                context=context,
                context_mask=context_mask,
                cache=cache,
                positions=positions,
                segments=segments,
                context_segments=context_segments,
            )
        return self.norm(hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states `[..., C]` to scores `[..., V]`."""
        return self.head(hidden, self.words)


def _final_norm(config: TranslatorConfig) -> nn.Module:
    # Post-norm layers end in a norm already.
    return nn.LayerNorm(config.embed_dim, eps=config.norm_eps) if config.norm_first else nn.Identity()


def _layer(config: TranslatorConfig, *, is_decoder: bool) -> TransformerLayer:
    num_heads = config.decoder_heads if is_decoder else config.encoder_heads
    rotary = RotaryEmbedding(config.embed_dim // num_heads) if config.positions == "rotary" else None
    return TransformerLayer(
        config.embed_dim,
        num_heads,
        config.decoder_ffn_dim if is_decoder else config.encoder_ffn_dim,
        num_kv_heads=config.decoder_kv_heads if is_decoder else config.encoder_kv_heads,
        has_cross_attention=is_decoder,
        is_causal=is_decoder,
        norm_first=config.norm_first,
        norm_eps=config.norm_eps,
        activation=cast("ActivationName", config.activation),
        dropout_p=config.dropout_p,
        attention_dropout_p=config.attention_dropout_p,
        activation_dropout_p=config.activation_dropout_p,
        rotary=rotary,
    )


class TranslatorNetwork(nn.Module):
    """Encoder and decoder; fresh weights come from torch's global generator.

    Raises:
        ConfigError: a config whose parts do not fit together.
    """

    def __init__(self, config: TranslatorConfig) -> None:
        super().__init__()
        config.validate()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        _init_weights(self)

    def encode(self, source_ids: Tensor, source_mask: Tensor | None = None) -> Tensor:
        """Source tokens `[B, Ls]` and their mask bool `[B, Ls]` (False: padding) to states `[B, Ls, C]`."""
        return self.encoder(source_ids, source_mask, self.decoder.words)

    def project_context(self, states: Tensor, source_mask: Tensor | None = None) -> LayerContexts:
        """The decoder's cross-attention keys and values, once per source; see `Decoder.project_context`."""
        return self.decoder.project_context(states, source_mask)

    def start(
        self,
        contexts: LayerContexts,
        *,
        rows_per_context: int = 1,
        max_length: int,
        window: int | None = None,
        reads_alignment: bool = False,
    ) -> TranslationState:
        """Begin decoding; see `TranslationState`."""
        reader = self.alignment_reader() if reads_alignment else None
        return TranslationState(
            self.decoder,
            contexts,
            rows_per_context=rows_per_context,
            max_length=max_length,
            window=window,
            alignment=reader,
        )

    def alignment_reader(self, layer: int | None = None, heads: Sequence[int] | None = None) -> AlignmentReader:
        """Reads the weights of a decoder layer's heads, all when `heads` is None; those that the config names for
        alignments when `layer` is None."""
        if layer is None:
            layer, heads = self.config.chosen_alignment_layer, self.config.alignment_heads
        cross_attn = cast(TransformerLayer, self.decoder.layers[layer]).cross_attn
        assert cross_attn is not None
        return AlignmentReader(cross_attn, heads)

    def forward(
        self,
        source_ids: Tensor,
        target_ids: Tensor,
        *,
        source_mask: Tensor | None = None,
        labels: Tensor | None = None,
        alignment: Tensor | None = None,
        source_segments: Segments | None = None,
        target_segments: Segments | None = None,
    ) -> TranslationOutput:
        """Score target texts under their sources.

        Packed batches have no padding: source and target ids of all sentences one after the other, `[N]` and `[M]`,
        with the segments of both.

        Args:
            source_ids: `[B, Ls]`.
            target_ids: `[B * n, Lt]`, what the decoder reads: the start token first.
            source_mask: bool `[B, Ls]`, False at padding.
            labels: `[B * n, Lt]`, the token that follows each of `target_ids`, -100 where nothing is scored.
            alignment: `[B * n, Lt, Ls]`, how much of the label at each place comes from each source token; rows sum to
                1, or to 0 where nothing is known. Adds the guided-alignment loss (arXiv 1909.02074).
            source_segments, target_segments: of a packed batch, as many sentences each.

        Raises:
            UsageError: wrong shapes, a sentence longer than the model's positions, or a mask, alignments or only one
                kind of segments with a packed batch.
        """
        if source_segments is not None or target_segments is not None:
            if source_segments is None or target_segments is None or not (source_mask is None and alignment is None):
                raise UsageError(
                    "a packed batch needs source_segments and target_segments, and takes no source_mask or alignment"
                )
            states = self.encoder(source_ids, None, self.decoder.words, source_segments)
            hidden = self.decoder(target_ids, states, segments=target_segments, context_segments=source_segments)
            return self._output(hidden, labels)
        states = self.encode(source_ids, source_mask)
        # Projected inside the layers: where those are sharded, their weights are whole only while they run.
        if alignment is None:
            hidden = self.decoder(target_ids, states, context_mask=source_mask)
            return self._output(hidden, labels)
        reader = self.alignment_reader()
        with reader.reading():
            hidden = self.decoder(target_ids, states, context_mask=source_mask)
        weights = reader.take().view(alignment.shape[0], alignment.shape[1], -1)
        return self._output(hidden, labels, *alignment_loss(weights, alignment))

    def _output(self, hidden: Tensor, labels: Tensor | None, *alignment: Tensor) -> TranslationOutput:
        if labels is None:
            return TranslationOutput(self.decoder.logits(hidden), None, None, None, *alignment)
        smoothing = self.config.label_smoothing
        decoder = self.decoder
        scored = score_labels(hidden, labels, decoder.head, decoder.words, label_smoothing=smoothing)
        return TranslationOutput(None, scored.loss_sum, scored.num_tokens, scored.targets, *alignment)


def _init_weights(network: TranslatorNetwork) -> None:
    """Embeddings of spread C ** -0.5 with a zero padding row, Xavier Linears without bias, as Marian trains from."""
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=network.config.embed_dim**-0.5)
            nn.init.zeros_(module.weight[network.config.pad_token_id])
        elif isinstance(module, LearnedPositions):
            nn.init.normal_(module.weight, std=network.config.embed_dim**-0.5)


def cross_attention_parameters(network: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of every cross-attention and its norm, by name."""
    return {name: parameter for name, parameter in network.named_parameters() if ".cross_attn" in name}
