"""What a translator's folder says besides the weights: a vocabulary that must fit them, and how to generate."""

from __future__ import annotations

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
