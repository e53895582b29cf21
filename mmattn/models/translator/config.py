"""What a translation network is made of: a plain dataclass, readable as YAML or JSON."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from mmattn.errors import ConfigError
from mmattn.models.fields import fill, require_ranges

POSITIONS = ("sinusoidal", "tensor2tensor", "learned", "rotary")


@dataclass
class TranslatorConfig:
    """Form of an encoder-decoder translator (arXiv 1706.03762). The defaults are those of OPUS-MT's Marian models.

    Args:
        vocab_size: Tokens of the vocabulary of the source, and of the target unless `target_vocab_size` says otherwise.
            A new model has its tokenizer's instead.
        target_vocab_size: A vocabulary and an embedding of the target's own. None: one for both sides, as new models
            have.
        embed_dim: Width of the network; heads divide it.
        encoder_layers: Layers of the encoder.
        decoder_layers: Layers of the decoder.
        encoder_heads: Heads of each attention of the encoder.
        decoder_heads: Heads of each attention of the decoder.
        encoder_kv_heads: Key/value heads of the encoder's attention (GQA; 1: MQA). None: as many as heads.
        decoder_kv_heads: Key/value heads of the decoder's attention, self and cross; fewer make the cache smaller.
            None: as many as heads.
        encoder_ffn_dim: Width inside the encoder's feed-forward.
        decoder_ffn_dim: Width inside the decoder's feed-forward.
        activation: Function inside the feed-forward: "relu", "silu", "gelu", "gelu_tanh", or gated "swiglu", "geglu".
        norm_first: True: pre-norm, with a norm after the last layer (M2M100). False: post-norm (Marian).
        norm_eps: Added to the variance in norms.
        positions: "sinusoidal" (as Marian spaces the frequencies), "tensor2tensor" (as M2M100 does), "learned" or
            "rotary" (self-attention only).
        position_offset: The position of the first token.
        max_positions: Longest text on either side, in tokens.
        scale_embedding: Multiply embeddings by the root of `embed_dim`.
        logits_bias: A fixed bias on the logits (Marian's `final_logits_bias`).
        tie_word_embeddings: The vocabulary head uses the target embedding's matrix.
        dropout_p: Dropout on embeddings and on what each sublayer adds, in training only.
        attention_dropout_p: Dropout on attention weights, in training only.
        activation_dropout_p: Dropout inside the feed-forward, in training only.
        label_smoothing: Of the training loss. In a recipe set `examples.label_smoothing` instead.
        alignment_layer: The decoder layer whose cross-attention says which source word a target word comes from,
            counted from 0. None: the last but one, or the only one.
        alignment_heads: The heads that are averaged for it, counted from 0. None: all.
        pad_token_id: Number of the padding token; a new model has its tokenizer's.
        eos_token_id: Number of the token that ends a text; a new model has its tokenizer's.
        decoder_start_token_id: Number of the token that a translation starts from; of a new model the padding.
        stock: Fields of an opened checkpoint's config that the network has no use for, written back when it is saved;
            empty for a new model.
    """

    vocab_size: int = 58101
    target_vocab_size: int | None = None
    embed_dim: int = 512
    encoder_layers: int = 6
    decoder_layers: int = 6
    encoder_heads: int = 8
    decoder_heads: int = 8
    encoder_kv_heads: int | None = None
    decoder_kv_heads: int | None = None
    encoder_ffn_dim: int = 2048
    decoder_ffn_dim: int = 2048
    activation: str = "silu"
    norm_first: bool = False
    norm_eps: float = 1e-5
    positions: str = "sinusoidal"
    position_offset: int = 0
    max_positions: int = 512
    scale_embedding: bool = True
    logits_bias: bool = True
    tie_word_embeddings: bool = True
    dropout_p: float = 0.1
    attention_dropout_p: float = 0.0
    activation_dropout_p: float = 0.0
    label_smoothing: float = 0.0
    alignment_layer: int | None = None
    alignment_heads: list[int] | None = None
    pad_token_id: int = 58100
    eos_token_id: int = 0
    decoder_start_token_id: int = 58100
    stock: dict[str, Any] = field(default_factory=dict)

    @property
    def shares_embedding(self) -> bool:
        """Whether source and target have one embedding."""
        return self.target_vocab_size is None

    @property
    def output_size(self) -> int:
        """V, the number of tokens that the decoder chooses from."""
        return self.vocab_size if self.target_vocab_size is None else self.target_vocab_size

    @property
    def chosen_alignment_layer(self) -> int:
        """The decoder layer that alignments are read from."""
        return max(self.decoder_layers - 2, 0) if self.alignment_layer is None else self.alignment_layer

    def validate(self) -> None:
        """Raise `ConfigError` when the parts do not fit together."""
        require_ranges(self)
        for side in ("encoder", "decoder"):
            heads, kv_heads = getattr(self, f"{side}_heads"), getattr(self, f"{side}_kv_heads")
            if getattr(self, f"{side}_layers") < 1:
                raise ConfigError(f"{side}_layers is {getattr(self, f'{side}_layers')}, it must be at least 1")
            if heads < 1 or self.embed_dim % heads:
                raise ConfigError(f"embed_dim {self.embed_dim} is not divisible by {side}_heads {heads}")
            if kv_heads is not None and (kv_heads < 1 or heads % kv_heads):
                raise ConfigError(f"{side}_heads {heads} is not divisible by {side}_kv_heads {kv_heads}")
            if self.positions == "rotary" and (self.embed_dim // heads) % 2:
                raise ConfigError(f"positions=rotary needs heads of an even width, not {self.embed_dim // heads}")
        if self.positions not in POSITIONS:
            raise ConfigError(f"positions is {self.positions!r}: choose one of {', '.join(POSITIONS)}")
        if self.positions == "tensor2tensor" and self.embed_dim % 2:
            raise ConfigError(f"positions=tensor2tensor needs an even embed_dim, not {self.embed_dim}")
        if not 0 <= self.chosen_alignment_layer < self.decoder_layers:
            raise ConfigError(f"alignment_layer {self.alignment_layer}: there are {self.decoder_layers} decoder layers")
        if self.alignment_heads is not None and not self.alignment_heads:
            raise ConfigError("alignment_heads is []: name at least one head, or leave it out for all")
        if any(not 0 <= head < self.decoder_heads for head in self.alignment_heads or ()):
            raise ConfigError(f"alignment_heads {self.alignment_heads}: there are {self.decoder_heads} heads")
        for name in ("pad_token_id", "eos_token_id", "decoder_start_token_id"):
            token, size = getattr(self, name), min(self.vocab_size, self.output_size)
            if not 0 <= token < size:
                raise ConfigError(f"{name} {token} is outside the vocabulary of {size}")

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TranslatorConfig:
        """The opposite of `to_dict`.

        Raises:
            ConfigError: a field that does not exist, or parts that do not fit together.
        """
        config = fill(cls, values)
        config.validate()
        return config
