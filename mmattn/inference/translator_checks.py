"""What a translator's folder says besides the weights: a vocabulary that must fit them, and how to generate."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase

from mmattn.errors import CheckpointError
from mmattn.inference import folders
from mmattn.models.translator import TranslatorConfig


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, config: TranslatorConfig) -> None:
    """Raise unless a tokenizer's entries and special tokens are those of the weights.

    Raises:
        CheckpointError: they are not of one model.
    """
    sizes = {"vocabulary": (max(tokenizer.get_vocab().values(), default=-1) + 1, config.vocab_size)}
    target = getattr(tokenizer, "target_encoder", None)
    if target:
        sizes["target vocabulary"] = (max(target.values()) + 1, config.output_size)
    for what, (needed, available) in sizes.items():
        if needed > available:
            raise CheckpointError(
                f"the tokenizer's {what} has {needed} entries, the weights {available}: they are not of one model"
            )
    for name in ("pad_token_id", "eos_token_id"):
        ours, theirs = getattr(config, name), getattr(tokenizer, name)
        if ours != theirs:
            raise CheckpointError(
                f"the tokenizer's {name} is {theirs}, the weights' config says {ours}: they are not of one model"
            )


def generation_defaults(folder: Path, config: TranslatorConfig) -> dict[str, Any]:
    """The folder's `generation_config.json`; without one what `config.json` says of it, as transformers does."""
    if (folder / folders.GENERATION_FILE).is_file():
        return folders.read_generation_config(folder)
    plain = GenerationConfig().to_dict()
    return {name: value for name, value in config.stock.items() if name in plain and value != plain[name]}


def special_tokens(generation: Mapping[str, Any], config: TranslatorConfig) -> tuple[int, int | list[int]]:
    """The token that decoding starts from, and what ends it: those of the generation settings, else the network's.

    Raises:
        CheckpointError: the settings name something else than tokens of the vocabulary.
    """
    start, end = (
        getattr(config, name) if generation.get(name) is None else generation[name]
        for name in ("decoder_start_token_id", "eos_token_id")
    )
    for name, tokens in (
        ("decoder_start_token_id", [start]),
        ("eos_token_id", end if isinstance(end, list) else [end]),
    ):
        if not all(type(token) is int and 0 <= token < config.output_size for token in tokens):
            raise CheckpointError(
                f"{folders.GENERATION_FILE}: {name} is {generation[name]}: tokens of the vocabulary of "
                f"{config.output_size} are needed"
            )
    return start, end
