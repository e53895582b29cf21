"""What lies beside the weights in a model folder: tokenizer, image processor, generation settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mmattn.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

GENERATION_FILE = "generation_config.json"


def open_tokenizer(folder: Path, *, is_stock: bool, has_stock_config: bool = True) -> PreTrainedTokenizerBase:
    """The folder's tokenizer.

    Args:
        folder: of a model.
        is_stock: the tokenizer is of the class that the files name, else a plain fast one.
        has_stock_config: transformers knows the folder's `config.json` too; else the tokenizer's own files say all.

    Raises:
        CheckpointError: no tokenizer there, or a damaged one.
    """
    opener = AutoTokenizer if is_stock else PreTrainedTokenizerFast
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.txt", "tokenizer.model", "vocab.json")):
        raise CheckpointError(f"{folder}: no tokenizer: the folder needs tokenizer.json beside the weights")
    try:
        # A config given here keeps transformers from reading, and warning of, one that it does not know.
        options: dict[str, Any] = {} if has_stock_config else {"config": PreTrainedConfig()}
        return opener.from_pretrained(folder, local_files_only=True, **options)
    except Exception as error:  # whatever a damaged file makes the tokenizer library raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{folder}: the tokenizer cannot be opened: {reason}") from error


def open_image_processor(folder: Path) -> BlipImageProcessorPil:
    """The folder's image processor, always of the Pillow kind: torchvision's resizes differently.

    Raises:
        CheckpointError: no image processor there, or a damaged one.
    """
    # It loads all that transformers' models are made of, for which a translator has no use.
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    if not any((folder / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")):
        raise CheckpointError(f"{folder}: no image processor: the folder needs preprocessor_config.json")
    try:
        return BlipImageProcessorPil.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{folder}: the image processor cannot be opened: {str(error).splitlines()[0]}"
        ) from error


def read_generation_config(folder: Path) -> dict[str, Any]:
    """The content of `generation_config.json`; empty when there is none.

    Raises:
        CheckpointError: it is no JSON object.
    """
    file = folder / GENERATION_FILE
    if not file.is_file():
        return {}
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file}: not JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{file}: must hold a JSON object")
    return values


def write_generation_config(folder: Path, values: dict[str, Any]) -> None:
    """Write `generation_config.json`."""
    (folder / GENERATION_FILE).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def default_device() -> torch.device:
    """The first accelerator (CUDA, then Apple's), else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def usable_device(device: torch.device | str | int | None) -> torch.device:
    """The device that is meant, with its number; None: the default.

    Raises:
        UsageError: no device, one that this machine does not have, or "meta", which holds no numbers.
    """
    if device is None:
        return default_device()
    try:
        found = torch.empty(0, device=torch.device(device)).device
    except (RuntimeError, AssertionError, TypeError, ImportError) as error:  # all of these, for one device or another
        reason = str(error).splitlines()[0]
        raise UsageError(f"device {device!r} cannot be used here: {reason}; mmattn doctor names those there are") from (
            error
        )
    if found.type == "meta":
        raise UsageError(f"device {device!r} holds no numbers: weights there would be lost")
    return found


def default_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 (or float16) on a CUDA device that computes in it; float32 elsewhere, where halves are slow."""
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
