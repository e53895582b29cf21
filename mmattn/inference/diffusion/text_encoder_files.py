"""Text encoders out of folders and hub repositories, strictly."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    MT5EncoderModel,
    PreTrainedConfig,
    PreTrainedModel,
    T5EncoderModel,
    UMT5EncoderModel,
)

from mmattn.errors import CheckpointError
from mmattn.inference.diffusion.text_encoding import ENCODER_FOLDER, TOKENIZER_FOLDER, TextEncoding
from mmattn.inference.folders import open_tokenizer
from mmattn.models.checkpoints import fault
from mmattn.models.saving import weights_dtype
from mmattn.models.sources import find_folder, read_config

_log = logging.getLogger(__name__)

_CLASSES: dict[str, Any] = {
    "clip": CLIPTextModel,
    "clip_text_model": CLIPTextModel,
    "mt5": MT5EncoderModel,
    "t5": T5EncoderModel,
    "umt5": UMT5EncoderModel,
}
# Parts of a checkpoint that are no part of its text encoder: the other tower, the decoder, heads, fixed positions.
_OTHER_PARTS = re.compile(
    r"(vision_model|visual_projection|text_projection|logit_scale|decoder|lm_head|cls|vocab_\w+)\b.*|.*\bposition_ids"
)
_NOT_TEXT = ("vision_config", "image_size", "num_mel_bins", "sampling_rate", "audio_config")


def open_text_encoder(
    id_or_folder: str | Path,
    *,
    max_length: int | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    variant: str | None = None,
    dtype: torch.dtype | str | None = None,
    local_files_only: bool = False,
) -> TextEncoding:
    """Open a text encoder: CLIP's, T5's encoder, BERT and its like, or any other model whose states are of text.

    Args:
        id_or_folder: a hub id, a folder with `config.json`, weights and tokenizer side by side, or a folder with
            `text_encoder/` and `tokenizer/` in it (ours, or a Stable Diffusion folder: its first encoder, with its
            padding masked; `sd_text_encodings` encodes as Stable Diffusion's own pipeline does).
        max_length: tokens of a prompt at most; None for what the encoder takes.
        revision: branch, tag or commit on the hub.
        token: hub token; None: the one stored by `hf auth login`.
        variant: infix of the weight files, such as `fp16`.
        dtype: of the weights; None for float32, "auto" for that of the file.
        local_files_only: never go to the network.

    Returns:
        The encoder in `eval()` mode on the CPU, with its tokenizer; its weights can be trained until `freeze()`.

    Raises:
        CheckpointError: no such model, one whose states are not of text alone, or weights that do not fit.
        UsageError: a `max_length` beyond what the encoder takes.
    """
    folder = Path(id_or_folder).expanduser()
    if not (folder / ENCODER_FOLDER).is_dir():
        options = {"revision": revision, "token": token, "variant": variant, "local_files_only": local_files_only}
        folder = find_folder(id_or_folder, **options)
    is_split = (folder / ENCODER_FOLDER).is_dir()
    encoder_folder = folder / ENCODER_FOLDER if is_split else folder
    encoder = _open_encoder(encoder_folder, variant, weights_dtype(dtype))
    tokenizer = open_tokenizer(folder / TOKENIZER_FOLDER if is_split else folder, is_stock=True)
    try:
        return TextEncoding(encoder, tokenizer, max_length)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from error


def _open_encoder(folder: Path, variant: str | None, dtype: torch.dtype | None) -> PreTrainedModel:
    config = _open_config(folder)
    _announce_pickle(folder, variant)
    options: dict[str, Any] = {"dtype": dtype or "auto", "variant": variant, "local_files_only": True}
    encoder, loading = _load(folder, config, options)
    missing = sorted(loading["missing_keys"])
    if missing and all(name.startswith("pooler.") for name in missing):
        # Saved by a class without a pooler: its weights would be random.
        encoder, loading = _load(folder, config, {**options, "add_pooling_layer": False})
        missing = sorted(loading["missing_keys"])
    unexpected = sorted(name for name in loading["unexpected_keys"] if not _OTHER_PARTS.fullmatch(name))
    faults = {"missing": missing, "not known": unexpected}
    if any(faults.values()):
        listed = "; ".join(fault(what, names) for what, names in faults.items() if names)
        raise CheckpointError(f"{folder}: the weights do not fit its config: {listed}")
    return encoder.eval()


def _open_config(folder: Path) -> PreTrainedConfig:
    values = read_config(folder)
    kind = values.get("model_type")
    if "_class_name" in values or kind is None:
        what = values.get("_class_name", "no transformers model")
        raise CheckpointError(f"{folder}: {what}, not a text encoder: its config.json names no model_type")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder}: transformers does not know the model_type {kind!r}") from error
    if kind in _CLASSES:
        return config
    if config.is_encoder_decoder:
        raise CheckpointError(
            f"{folder}: {kind} is an encoder-decoder, whose encoder cannot be opened alone: use T5, CLIP or BERT"
        )
    if any(getattr(config, name, None) is not None for name in _NOT_TEXT):
        raise CheckpointError(f"{folder}: {kind} is not a model of text alone: use a text encoder (CLIP, T5, BERT)")
    return config


def _load(folder: Path, config: PreTrainedConfig, options: dict[str, Any]) -> tuple[PreTrainedModel, dict[str, Any]]:
    opener = _class_of(config)
    if config.model_type == "clip":
        config = config.text_config  # pyright: ignore[reportAttributeAccessIssue]
    try:
        encoder, loading = opener.from_pretrained(folder, config=config, output_loading_info=True, **options)
    except Exception as error:  # whatever missing, damaged or mis-shaped files make the loader raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"{folder}: the text encoder cannot be opened: {reason}") from error
    return encoder, loading


def _class_of(config: PreTrainedConfig) -> Any:
    if config.model_type == "clip_text_model" and "CLIPTextModelWithProjection" in (config.architectures or ()):
        return CLIPTextModelWithProjection
    return _CLASSES.get(config.model_type, AutoModel)


def _announce_pickle(folder: Path, variant: str | None) -> None:
    infix = f".{variant}" if variant else ""
    if not any(folder.glob(f"model{infix}[.-]*safetensors*")) and any(folder.glob("pytorch_model*.bin")):
        _log.warning("%s holds a pickle, not safetensors: reading it with torch.load(weights_only=True)", folder)
