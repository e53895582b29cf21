"""Prompts to what a U-Net attends to: any transformers text encoder with its tokenizer."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mmattn.errors import CheckpointError, UsageError
from mmattn.inference.diffusion.prompt_tokens import check_prompts, cut_message, cut_text, token_limit
from mmattn.inference.text_fingerprints import encoders_fingerprint

_log = logging.getLogger(__name__)

ENCODER_FOLDER, TOKENIZER_FOLDER = "text_encoder", "tokenizer"

_SAID = 10  # prompts that are named when they are cut; a data set may have thousands


@dataclass(frozen=True)
class EncodedText:
    """Encoded prompts.

    Attributes:
        states: `[B, L, C]`.
        key_mask: `[B, L]`, True = may attend; None when all may be attended.
        pooled: `[B, P]`, or None where the encoder has none.
    """

    states: Tensor
    key_mask: Tensor | None = None
    pooled: Tensor | None = None

    @property
    def batch_size(self) -> int:
        """B."""
        return self.states.shape[0]

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> EncodedText:
        """On another device, or with states of another dtype."""
        key_mask = None if self.key_mask is None else self.key_mask.to(device)
        pooled = None if self.pooled is None else self.pooled.to(device, dtype)
        return EncodedText(self.states.to(device, dtype), key_mask, pooled)


class PromptEncoder(Protocol):
    """What `TextEncoding` and a Stable Diffusion pipeline's encoders have in common."""

    max_length: int | None

    def encode_prompts(self, prompts: Sequence[str]) -> EncodedText:
        """Texts to states."""
        ...

    def cut(self, prompts: Sequence[str]) -> list[str | None]:
        """What of each prompt does not fit, None where all of it does."""
        ...

    def fingerprint(self) -> str:
        """Hash of everything that has a say in the states."""
        ...


class PromptTokens:
    """A tokenizer with a limit: prompts to tokens, saying what is cut.

    Args:
        tokenizer: of a text encoder.
        max_length: tokens of a prompt at most, special tokens included; None: no limit.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> None:
        self.tokenizer, self.max_length = tokenizer, max_length
        self._said: set[str] = set()

    def __call__(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """As `TextEncoding.tokenize`."""
        prompts = check_prompts(prompts)
        # Padding goes to the right, whatever the tokenizer is set to: positions are counted from the left.
        batch = self.tokenizer(
            prompts,
            padding=True,
            padding_side="right",
            truncation=self.max_length is not None,
            max_length=self.max_length,
            return_attention_mask=True,
            return_tensors="pt",
        )
        self._say_cuts(prompts, batch["attention_mask"])
        return {name: batch[name] for name in ("input_ids", "attention_mask")}

    def _say_cuts(self, prompts: Sequence[str], attention_mask: Tensor) -> None:
        if self.max_length is None or attention_mask.shape[1] < self.max_length:
            return
        for prompt, length in zip(prompts, attention_mask.sum(1).tolist(), strict=True):
            if length < self.max_length or prompt in self._said or len(self._said) >= _SAID:
                continue
            cut = cut_text(self.tokenizer, prompt, self.max_length)
            if cut is not None:
                self._said.add(prompt)
                more = "; further ones are cut and not named" if len(self._said) == _SAID else ""
                _log.warning("%s%s", cut_message(prompt, cut, self.max_length), more)


class TextEncoding:
    """A text encoder with its tokenizer: prompts to states, with a mask over their padding.

    Args:
        encoder: any transformers text encoder: CLIP, T5, BERT and its like.
        tokenizer: its tokenizer.
        max_length: tokens of a prompt at most, special tokens included; None for what the encoder takes.

    Raises:
        CheckpointError: a tokenizer that is not the encoder's, or that makes nothing of an empty prompt.
        UsageError: a `max_length` beyond what the encoder takes, or too small for any word.
    """

    def __init__(
        self, encoder: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_length: int | None = None
    ) -> None:
        _check_tokenizer(encoder, tokenizer)
        self.encoder, self.tokenizer = encoder, tokenizer
        self.max_length = _check_length(encoder, tokenizer, max_length)
        self.tokens = PromptTokens(tokenizer, self.max_length)

    @property
    def width(self) -> int:
        """C, the channels of the states."""
        return self.encoder.config.hidden_size

    @property
    def is_frozen(self) -> bool:
        """Whether no weight of the encoder is trained."""
        return not any(parameter.requires_grad for parameter in self.encoder.parameters())

    def freeze(self) -> TextEncoding:
        """Train none of the encoder's weights, and leave its dropout off; returns itself."""
        self.encoder.requires_grad_(False).eval()
        return self

    def tokenize(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Texts to tokens, padded to the longest.

        A prompt that is too long is cut, and a warning says what was cut, once per text and for ten texts at most.

        Args:
            prompts: texts; empty ones are allowed.

        Returns:
            `input_ids` and `attention_mask`, `[B, L]` int64 on the CPU; 1 in the mask for tokens, 0 for padding.

        Raises:
            UsageError: no list of texts.
        """
        return self.tokens(prompts)

    def encode(self, ids: Mapping[str, Tensor]) -> EncodedText:
        """Tokens of `tokenize` to states, on the encoder's device; with gradients where the encoder is trained."""
        input_ids = ids["input_ids"].to(self.encoder.device)
        attention_mask = ids["attention_mask"].to(self.encoder.device)
        output = self.encoder(input_ids=input_ids, attention_mask=attention_mask)
        pooled = output.get("text_embeds", output.get("pooler_output"))
        return EncodedText(output["last_hidden_state"], attention_mask.bool(), pooled)

    def encode_prompts(self, prompts: Sequence[str]) -> EncodedText:
        """`encode(tokenize(prompts))`."""
        return self.encode(self.tokenize(prompts))

    def cut(self, prompts: Sequence[str]) -> list[str | None]:
        """What of each prompt does not fit into the encoder, as text; None where all of it does."""
        return [cut_text(self.tokenizer, prompt, self.max_length) for prompt in check_prompts(prompts)]

    def fingerprint(self) -> str:
        """Hash of config, weights, tokenizer and `max_length`: equal hashes, equal states (in float rounding)."""
        return encoders_fingerprint([self.encoder], [self.tokenizer], {"max_length": self.max_length})

    def save_pretrained(self, folder: str | Path) -> None:
        """Write stock transformers folders, `text_encoder/` and `tokenizer/`."""
        folder = Path(folder)
        self.encoder.save_pretrained(folder / ENCODER_FOLDER)
        self.tokenizer.save_pretrained(folder / TOKENIZER_FOLDER)


def _check_tokenizer(encoder: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    if tokenizer.pad_token_id is None:
        raise CheckpointError(
            "the tokenizer has no padding token, so that prompts of different lengths make no batch:"
            " set tokenizer.pad_token and save it again"
        )
    if not tokenizer("")["input_ids"]:
        raise CheckpointError(
            "the tokenizer adds no start or end token, so that an empty prompt (guidance needs one) has no token at"
            " all: choose a text encoder such as CLIP, T5 or BERT"
        )
    table = encoder.get_input_embeddings()
    if isinstance(table, nn.Embedding) and len(tokenizer) > table.num_embeddings:
        raise CheckpointError(
            f"the tokenizer has {len(tokenizer)} tokens and the text encoder embeddings of {table.num_embeddings}:"
            " they do not belong together"
        )


def _check_length(encoder: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> int | None:
    limit = token_limit(encoder, tokenizer)
    if max_length is None:
        return limit
    if limit is not None and max_length > limit:
        raise UsageError(f"max_length {max_length}: this text encoder takes {limit} tokens at most")
    smallest = tokenizer.num_special_tokens_to_add() + 1
    if max_length < smallest:
        raise UsageError(f"max_length {max_length}: give {smallest} or more, for a word and the special tokens")
    return max_length
