"""A text encoder for training: opened, or a small one from scratch with a tokenizer of its own."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Optional

from tokenizers.processors import TemplateProcessing
from transformers import CLIPTextConfig, CLIPTextModel

from mmattn.data.tokenizer import BOS, EOS, train_tokenizer
from mmattn.errors import ConfigError
from mmattn.inference.diffusion.text_encoder_files import open_text_encoder
from mmattn.inference.diffusion.text_encoding import TextEncoding
from mmattn.inference.trained import require_source, warn_of_unused

_PATH = "model.text_encoder"
_OF_A_NEW_ONE = ("tokenizer", "max_vocab_size", "lowercase", "width", "num_layers", "num_heads", "dropout_p")


@dataclass
class TextEncoderConfig:
    """The text encoder: one to open, or the form of a new one.

    Args:
        from_pretrained: Hub id or folder. None makes a new one; what is said of a new one is not used beside it, which
            the log says.
        revision: Branch, tag or commit on the hub.
        frozen: Whether its weights stay as they are; None freezes an opened one and trains a new one.
        max_length: Tokens of a prompt at most; None for what an opened encoder takes, and 77 for a new one.
        tokenizer: Of a new one, trained on its texts: "word" for small closed vocabularies, "bpe" for natural text.
        max_vocab_size: Of a new one: upper bound of that tokenizer's vocabulary.
        lowercase: Of a new one: whether that tokenizer folds case.
        width: Of a new one: channels.
        num_layers: Of a new one: layers; 0 leaves token and position embeddings under a norm.
        num_heads: Of a new one: heads of each layer; they divide the width.
        dropout_p: Of a new one: dropout on its attention weights, in training only.
    """

    from_pretrained: Optional[str] = None  # noqa: UP045 (OmegaConf reads Optional on every Python version)
    revision: Optional[str] = None  # noqa: UP045
    frozen: Optional[bool] = None  # noqa: UP045
    max_length: Optional[int] = None  # noqa: UP045
    tokenizer: str = "word"
    max_vocab_size: int = 8000
    lowercase: bool = True
    width: int = 128
    num_layers: int = 2
    num_heads: int = 4
    dropout_p: float = 0.0


def make_text_encoding(texts: Iterable[str], config: TextEncoderConfig) -> TextEncoding:
    """Open the text encoder that is wanted, or make a new one; frozen or not, as the config says.

    Args:
        texts: of the training split; looked at for a new one only.
        config: the text encoder.

    Raises:
        CheckpointError: it cannot be opened.
        ConfigError: a form that does not fit together, or a new encoder that shall not be trained.
        DataError: no text to train a tokenizer on.
    """
    require_source(config, ["revision"], _PATH)
    if config.from_pretrained is None:
        return new_text_encoder(texts, config)
    warn_of_unused(config, _OF_A_NEW_ONE, _PATH)
    encoding = open_text_encoder(config.from_pretrained, revision=config.revision, max_length=config.max_length)
    return encoding if config.frozen is False else encoding.freeze()


def new_text_encoder(texts: Iterable[str], config: TextEncoderConfig) -> TextEncoding:
    """A small CLIP text encoder (arXiv 2103.00020) with random weights, and a tokenizer trained on the texts.

    Both are stock classes: what is saved opens with `CLIPTextModel` and `AutoTokenizer`.

    Args:
        texts: of the training split.
        config: its form.

    Raises:
        ConfigError: sizes that do not fit together, or `frozen`: there is nothing learned to keep.
        DataError: no text to train a tokenizer on.
    """
    _check_form(config)
    max_length = 77 if config.max_length is None else config.max_length
    tokenizer = train_tokenizer(texts, config.tokenizer, vocab_size=config.max_vocab_size, lowercase=config.lowercase)
    special: dict[str, Any] = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{BOS} $A {EOS}", special_tokens=[(BOS, special["bos"]), (EOS, special["eos"])]
    )
    tokenizer.model_max_length = max_length
    encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.width,
            intermediate_size=4 * config.width,
            projection_dim=config.width,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            max_position_embeddings=max_length,
            attention_dropout=config.dropout_p,
            **{f"{name}_token_id": number for name, number in special.items()},
        )
    )
    return TextEncoding(encoder, tokenizer)


def _check_form(config: TextEncoderConfig) -> None:
    if config.frozen:
        raise ConfigError("text_encoder.frozen: a new text encoder has learned nothing yet: train it, or open one")
    for name, lowest in {"width": 1, "num_layers": 0, "num_heads": 1}.items():
        if getattr(config, name) < lowest:
            raise ConfigError(f"text_encoder.{name} must be at least {lowest}, not {getattr(config, name)}")
    if config.width % config.num_heads:
        raise ConfigError(f"text_encoder.width {config.width} is not a multiple of num_heads {config.num_heads}")
    if config.max_length is not None and config.max_length < 3:
        raise ConfigError(f"text_encoder.max_length must be at least 3 (start, a word, end), not {config.max_length}")
    if not 0 <= config.dropout_p < 1:
        raise ConfigError(f"text_encoder.dropout_p must be in [0, 1), not {config.dropout_p}")
