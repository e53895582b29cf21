"""Prompts as tokens: how many fit, and what of a prompt is cut off."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mmattn.errors import UsageError

_UNSAID = 1_000_000  # transformers' "no limit known" is a very large number


def check_prompts(prompts: Sequence[str]) -> list[str]:
    """The prompts as a list.

    Raises:
        UsageError: one string, no prompt at all, or something that is no text.
    """
    if isinstance(prompts, str):
        raise UsageError("prompts must be a list of texts: put a single one in brackets")
    prompts = list(prompts)
    if not prompts:
        raise UsageError("prompts: the list is empty, give one text or more")
    for number, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise UsageError(f"prompts[{number}] must be a text, not {type(prompt).__name__}")
    return prompts


def token_limit(encoder: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """How many tokens a text encoder takes, special tokens included; None when nothing limits it."""
    limits: list[int] = []
    if tokenizer.model_max_length < _UNSAID:
        limits.append(tokenizer.model_max_length)
    positions = getattr(encoder.config, "max_position_embeddings", None)
    if isinstance(positions, int):
        table = getattr(getattr(encoder, "embeddings", None), "position_embeddings", None)
        # RoBERTa and its like count from behind the padding's position.
        first = table.padding_idx + 1 if isinstance(table, nn.Embedding) and table.padding_idx is not None else 0
        limits.append(positions - first)
    return min(limits, default=None)


def cut_text(tokenizer: PreTrainedTokenizerBase, prompt: str, max_length: int | None) -> str | None:
    """What of a prompt is cut off when it is encoded in `max_length` tokens; None when it fits."""
    if max_length is None:
        return None
    room = max_length - tokenizer.num_special_tokens_to_add()
    # Not verbose: transformers would warn of the very length that is asked about.
    options: dict[str, Any] = {"add_special_tokens": False, "truncation": False, "verbose": False}
    if not tokenizer.is_fast:
        ids: list[int] = tokenizer(prompt, **options)["input_ids"]
        cut = ids[: len(ids) - room] if tokenizer.truncation_side == "left" else ids[room:]
        return str(tokenizer.decode(cut)).strip() if len(ids) > room else None
    spans = tokenizer(prompt, **options, return_offsets_mapping=True)["offset_mapping"]
    if len(spans) <= room:
        return None
    if tokenizer.truncation_side == "left":
        return prompt[: spans[len(spans) - room - 1][1]].strip()
    return prompt[spans[room][0] :].strip()


def cut_message(prompt: str, cut: str, max_length: int | None) -> str:
    """One line that says what of a prompt the text encoder does not see."""
    start = prompt if len(prompt) <= 60 else prompt[:57] + "..."
    return f"prompt {start!r} is longer than the {max_length} tokens that the text encoder takes; it was cut: {cut!r}"
