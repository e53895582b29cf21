"""What a vision-language network is made of: plain dataclasses, readable as YAML or JSON."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from mmattn.errors import ConfigError
from mmattn.models.fields import fill, require_ranges

POSITIONS = ("learned", "rotary")
TASKS = ("captioning", "question_answering", "matching")
IMAGE_ENCODERS = ("vit", "conv")


@dataclass
class ImageEncoderConfig:
    """The part that turns a picture into features `[B, Lk, C]`, which the text network looks at.

    Args:
        kind: "vit" (arXiv 2010.11929) cuts the picture into patches and puts a class token first:
            (image_size / patch_size)^2 + 1 features. "conv" runs 3x3 convolutions with batch norm, the first stage at
            full resolution, each later one halving the side until it is `grid`: grid^2 features. It learns from few
            pictures, where a ViT does not.
        image_size: Side of the square that every picture is resized to, in pixels.
        embed_dim: Width C of the features; heads divide it.
        num_layers: Transformer layers; 0 leaves patches or convolutions under a norm.
        num_heads: Heads of each layer.
        ffn_dim: Width inside the feed-forward.
        activation: Function inside the feed-forward: "gelu", "gelu_tanh", "relu", "silu", or gated "geglu", "swiglu".
        norm_eps: Added to the variance in layer norms.
        dropout_p: Dropout on what each sublayer adds, in training only.
        attention_dropout_p: Dropout on attention weights, in training only.
        position_std: Spread of the position table at the start.
        patch_size: vit: side of a patch in pixels; divides `image_size`.
        conv_channels: conv: channels of each stage.
        convs_per_stage: conv: convolutions of each stage.
        grid: conv: side of the grid of features; `image_size` halved once for each stage after the first.
    """

    kind: str = "vit"
    image_size: int = 384
    embed_dim: int = 768
    num_layers: int = 12
    num_heads: int = 12
    ffn_dim: int = 3072
    activation: str = "gelu"
    norm_eps: float = 1e-5
    dropout_p: float = 0.0
    attention_dropout_p: float = 0.0
    position_std: float = 0.02
    patch_size: int = 16
    conv_channels: list[int] = field(default_factory=lambda: [32, 64, 128])
    convs_per_stage: list[int] = field(default_factory=lambda: [1, 1, 3])
    grid: int = 8

    @property
    def num_features(self) -> int:
        """Lk, the number of features of a picture."""
        return self.grid**2 if self.kind == "conv" else (self.image_size // self.patch_size) ** 2 + 1

    def validate(self) -> None:
        """Raise `ConfigError` when the parts do not fit together."""
        if self.kind not in IMAGE_ENCODERS:
            raise ConfigError(f"image.kind is {self.kind!r}: choose one of {', '.join(IMAGE_ENCODERS)}")
        require_ranges(self, "image.")
        if self.num_layers and self.embed_dim % self.num_heads:
            raise ConfigError(f"image.embed_dim {self.embed_dim} is not divisible by image.num_heads {self.num_heads}")
        if self.kind == "vit" and self.image_size % self.patch_size:
            raise ConfigError(
                f"image.image_size {self.image_size} is not divisible by image.patch_size {self.patch_size}"
            )
        stages = len(self.conv_channels)
        if self.kind == "conv" and (len(self.convs_per_stage) != stages or min(self.convs_per_stage, default=0) < 1):
            raise ConfigError(
                f"image.convs_per_stage {list(self.convs_per_stage)} must hold a number of 1 or more for each of the"
                f" {stages} stages of image.conv_channels"
            )
        if self.kind == "conv" and (stages == 0 or self.image_size != self.grid * 2 ** (stages - 1)):
            raise ConfigError(
                f"image.conv_channels has {stages} stages, each after the first halving the side: they do not take"
                f" image.image_size {self.image_size} to image.grid {self.grid}"
            )


@dataclass
class TextConfig:
    """The text network: embeddings, transformer layers, vocabulary head.

    The defaults are our own decoder: pre-norm, a cross-attention sub-layer in every layer. BLIP's is post-norm
    (`norm_first: false`) with `embedding_norm` and `head_transform`, as in BERT (arXiv 1810.04805).

    Args:
        vocab_size: Tokens of the vocabulary; a new model has its tokenizer's instead.
        embed_dim: Width; heads divide it.
        num_layers: Transformer layers.
        num_heads: Heads of each attention.
        num_kv_heads: Key/value heads of each attention (GQA; 1: MQA); fewer make the cache smaller. None: as many as
            heads.
        ffn_dim: Width inside the feed-forward.
        max_positions: Longest text in tokens, prompt or question included.
        positions: "learned", or "rotary": relative, so that "the word before this one" is the same everywhere.
        activation: Function inside the feed-forward: "gelu", "gelu_tanh", "relu", "silu", or gated "geglu", "swiglu".
        norm_first: True: pre-norm, with a norm after the last layer. False: post-norm (BLIP).
        norm_eps: Added to the variance in layer norms.
        dropout_p: Dropout on embeddings and on what each sublayer adds, in training only.
        attention_dropout_p: Dropout on attention weights, in training only.
        cross_attention_every: Which layers look at the picture: 1: every one; n: layers n, 2n, ... counted from one.
        gated: Look at the picture in tanh-gated blocks before those layers (arXiv 2204.14198), else inside them.
        embedding_norm: A norm after the embeddings.
        head_transform: A Linear, the activation and a norm before the vocabulary head.
        tie_word_embeddings: The vocabulary head uses the embedding's matrix.
        label_smoothing: Part of the probability that the loss spreads over all tokens.
        initializer_range: Spread of embeddings and vocabulary head at the start.
        bos_token_id: Number of the token that starts a text; a new model has its tokenizer's.
        eos_token_id: Number of the token that ends a text; a new model has its tokenizer's.
        pad_token_id: Number of the padding token; a new model has its tokenizer's.
        sep_token_id: Number of the token between question and answer; a new model has its tokenizer's. None: it answers
            no questions.
        stop_token_id: Number of the token that ends a generated text. None: `eos_token_id` (BLIP stops at sep).
    """

    vocab_size: int = 30524
    embed_dim: int = 768
    num_layers: int = 12
    num_heads: int = 12
    num_kv_heads: int | None = None
    ffn_dim: int = 3072
    max_positions: int = 512
    positions: str = "learned"
    activation: str = "gelu"
    norm_first: bool = True
    norm_eps: float = 1e-5
    dropout_p: float = 0.0
    attention_dropout_p: float = 0.0
    cross_attention_every: int = 1
    gated: bool = False
    embedding_norm: bool = False
    head_transform: bool = False
    tie_word_embeddings: bool = True
    label_smoothing: float = 0.0
    initializer_range: float = 0.02
    bos_token_id: int = 1
    eos_token_id: int = 2
    pad_token_id: int = 0
    sep_token_id: int | None = None
    stop_token_id: int | None = None

    def has_cross_attention(self, layer: int) -> bool:
        """Whether layer number `layer`, counted from 0, attends to the context."""
        return (layer + 1) % self.cross_attention_every == 0

    def validate(self) -> None:
        """Raise `ConfigError` when the parts do not fit together."""
        require_ranges(self, "text.")
        if self.embed_dim % self.num_heads:
            raise ConfigError(f"text.embed_dim {self.embed_dim} is not divisible by text.num_heads {self.num_heads}")
        if self.positions not in POSITIONS:
            raise ConfigError(f"text.positions is {self.positions!r}: choose one of {', '.join(POSITIONS)}")
        head_dim = self.embed_dim // self.num_heads
        if self.positions == "rotary" and head_dim % 2:
            raise ConfigError(f"text.positions=rotary needs heads of an even width, not {head_dim}")
        if not 1 <= self.cross_attention_every <= self.num_layers:
            raise ConfigError(
                f"text.cross_attention_every is {self.cross_attention_every}: it must lie between 1 and"
                f" text.num_layers {self.num_layers}, or no layer would see the picture"
            )
        for name in ("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "stop_token_id"):
            token = getattr(self, name)
            if token is not None and not 0 <= token < self.vocab_size:
                raise ConfigError(f"text.{name} {token} is outside the vocabulary of {self.vocab_size}")


@dataclass
class VLMConfig:
    """Form of a vision-language network.

    Args:
        task: What it is for: "captioning" (the one that the recipe trains; a new one answers questions, too),
            "question_answering" or "matching" (as BLIP has them).
        image_text_dim: matching: width of the common space of the cosine score.
        stock: Fields of an opened checkpoint's config that the network has no use for, written back when it is saved;
            empty for a new model.
    """

    task: str = "captioning"
    image: ImageEncoderConfig = field(default_factory=ImageEncoderConfig)
    text: TextConfig = field(default_factory=TextConfig)
    image_text_dim: int = 256
    stock: dict[str, Any] = field(default_factory=dict)

    def validate(self) -> None:
        """Raise `ConfigError` when the parts do not fit together."""
        if self.task not in TASKS:
            raise ConfigError(f"task is {self.task!r}: choose one of {', '.join(TASKS)}")
        self.image.validate()
        self.text.validate()

    @property
    def vocab_size(self) -> int:
        """Size of the vocabulary."""
        return self.text.vocab_size

    @property
    def bos_token_id(self) -> int:
        """The token that every decoded text starts with."""
        return self.text.bos_token_id

    @property
    def eos_token_id(self) -> int:
        """The tokenizer's end-of-text token; `stop_token_id` is what decoding stops at."""
        return self.text.eos_token_id

    @property
    def pad_token_id(self) -> int:
        """The token that fills the shorter texts of a batch."""
        return self.text.pad_token_id

    @property
    def sep_token_id(self) -> int | None:
        """The token between the parts of a text."""
        return self.text.sep_token_id

    @property
    def stop_token_id(self) -> int:
        """The token that ends a generated text."""
        return self.text.eos_token_id if self.text.stop_token_id is None else self.text.stop_token_id

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> VLMConfig:
        """The opposite of `to_dict`.

        Raises:
            ConfigError: a field that does not exist, or parts that do not fit together.
        """
        rest = dict(values)
        image = fill(ImageEncoderConfig, rest.pop("image", {}), "image.")
        text = fill(TextConfig, rest.pop("text", {}), "text.")
        config = fill(cls, {**rest, "image": image, "text": text})
        config.validate()
        return config
