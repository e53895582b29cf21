"""What a translation network is made of: a plain dataclass, readable as YAML or JSON."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from mmattn.errors import ConfigError
from mmattn.models.fields import fill

POSITIONS = ("sinusoidal", "tensor2tensor", "learned", "rotary")


@dataclass
class TranslatorConfig:
    """An encoder-decoder translator (arXiv 1706.03762). The defaults are the shape of OPUS-MT's Marian checkpoints.

    Args:
        vocab_size: tokens of the source vocabulary, and of the target's unless `target_vocab_size` says otherwise.
        target_vocab_size: a vocabulary and an embedding of the target's own; None: one embedding for both sides.
        embed_dim: C.
        encoder_layers, decoder_layers: number of layers.
        encoder_heads, decoder_heads: H.
        encoder_kv_heads, decoder_kv_heads: G of every attention of that side (GQA, MQA); H when None.
        encoder_ffn_dim, decoder_ffn_dim: width inside the feed-forward.
        activation: of the feed-forward, as in `mmattn.nn.FeedForward`.
        norm_first: pre-norm, with a norm after the last layer (M2M100), or post-norm (Marian).
        positions: "sinusoidal" (as Marian spaces the frequencies), "tensor2tensor" (as M2M100 does), "learned" or
            "rotary" (self-attention only).
        position_offset: the position of the first token.
        max_positions: longest text on either side, in tokens.
        scale_embedding: multiply embeddings by sqrt(C).
        logits_bias: a fixed bias on the logits (Marian's `final_logits_bias`).
        tie_word_embeddings: the vocabulary head uses the target embedding's matrix.
        dropout_p, attention_dropout_p, activation_dropout_p: in training only.
        label_smoothing: of the training loss.
        alignment_layer: the decoder layer whose cross-attention says which source word a target word comes from,
            counted from 0; None: the last but one, or the only one.
        alignment_heads: the heads that are averaged for it; None: all.
        pad_token_id, eos_token_id, decoder_start_token_id: special tokens.
        stock: the stock config's fields that the network has no use for; written back when it is saved.
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
