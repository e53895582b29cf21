"""LoRA files, and files of keys and values, in a diffusers pipeline: all of a file, or nothing."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HFValidationError
from torch import nn

from mmattn._optional import require
from mmattn.errors import CheckpointError, UsageError
from mmattn.inference.trained import run_part
from mmattn.models.unet.kv_file import merge_cross_attention_kv, read_cross_attention_kv

# The first matrix of a pair, by the names that diffusers, PEFT and the older formats have for it.
_PAIR = re.compile(r"lora_A\.|lora[._]down\.|lora_linear_layer\.down\.")
_TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
_CANNOT = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError)


def _find_file(path: str | Path) -> Path:
    """The one file that is meant: diffusers would guess among several, and take a misspelt name for a hub id."""
    place, name = Path(path).expanduser(), str(path)
    if place.is_file():
        return place
    if place.is_dir():
        place = run_part(place)
        found = [place / LORA_WEIGHT_NAME_SAFE]
        if not found[0].is_file():
            found = sorted(place.glob("*.safetensors"))
        if len(found) != 1:
            raise CheckpointError(
                f"{path}: {len(found)} .safetensors files and none is {LORA_WEIGHT_NAME_SAFE}: name the file itself"
            )
        return found[0]
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or place.suffix in (".safetensors", ".bin"):
        raise CheckpointError(f"{path}: no such file or folder")
    try:
        return Path(hf_hub_download(name, LORA_WEIGHT_NAME_SAFE))
    except (HFValidationError, OSError) as error:
        raise CheckpointError(
            f"{path}: neither a file nor a folder, and no {LORA_WEIGHT_NAME_SAFE} in such a repository on the hub, or"
            f" it cannot be reached: check the spelling ({type(error).__name__})"
        ) from error


def load_kv(pipeline: Any, folder: str | Path) -> tuple[str, ...]:
    """Keys and values into the U-Net and new tokens into the tokenizer. See `TextToImage.load_cross_attention_kv`."""
    folder = run_part(Path(folder)) if Path(folder).is_dir() else folder
    tokens = read_cross_attention_kv(folder).tokens
    if tokens and getattr(pipeline, "text_encoder_2", None) is not None:
        raise UsageError(
            f"{folder}: has new tokens, {', '.join(tokens)}, for one text encoder, but this model has two: load keys"
            " and values by mmattn.models.unet.kv_file.merge_cross_attention_kv, and use the prompts without the tokens"
        )
    known = pipeline.tokenizer.get_vocab() if tokens else {}
    for token, embedding in tokens.items():
        width = pipeline.text_encoder.get_input_embeddings().weight.shape[1]
        if embedding.shape[-1] != width:
            raise CheckpointError(
                f"{folder}: the token {token} has an embedding of width {embedding.shape[-1]}, but the text encoder's"
                f" have {width}: it is of another model"
            )
        if token in known:
            raise UsageError(f"{folder}: its token {token} is in the tokenizer already: open the model anew to load it")
    merge_cross_attention_kv(pipeline.unet, folder)
    for token, embedding in tokens.items():
        pipeline.load_textual_inversion({token: embedding}, token=token)
    return tuple(tokens)


class Adapters:
    """The LoRA files of a pipeline and how strongly each is applied.

    Args:
        pipeline: of diffusers, with `load_lora_weights`.
    """

    def __init__(self, pipeline: Any) -> None:
        self._pipeline = pipeline
        self._scales: dict[str, float] = {}

    def load(self, path: str | Path, scale: float) -> str:
        """Load a file beside those that are loaded; returns the adapter's name. See `TextToImage.load_lora`."""
        require("peft", "a LoRA file")
        is_number = isinstance(scale, int | float) and not isinstance(scale, bool)
        if not is_number:
            raise UsageError(f"scale is {scale!r}: it must be a number")
        others = sorted(self._loaded() - set(self._scales))
        if others:
            raise UsageError(
                f"the pipeline has an adapter that was loaded otherwise, {others[0]}: go on with "
                "pipeline.load_lora_weights and pipeline.set_adapters"
            )
        file = _find_file(path)
        name = self._new_name(Path(path))
        try:
            held = self._load_parts(file, name)
        except _CANNOT as error:
            self._remove(name)
            reason = (str(error).splitlines() or [""])[0] or type(error).__name__
            raise CheckpointError(f"{path}: cannot be loaded as a LoRA file of this model: {reason}") from error
        self._check_complete(path, name, sum(bool(_PAIR.search(key)) for key in held))
        self._scales[name] = float(scale)
        self._pipeline.set_adapters(list(self._scales), list(self._scales.values()))
        return name

    def _load_parts(self, file: Path, name: str) -> list[str]:
        """Load what a file has for each model; its keys.

        Diffusers' `load_lora_weights` warns of every model that a file has nothing for, as most have not for text
        encoders.
        """
        pipeline = self._pipeline
        held, alphas, metadata = pipeline.lora_state_dict(
            str(file), unet_config=pipeline.unet.config, return_lora_metadata=True
        )
        strange = next((key for key in held if "lora" not in key), None)
        if strange is not None:
            raise ValueError(f"it holds {strange}, which is no part of one")
        options = {"network_alphas": alphas, "metadata": metadata, "adapter_name": name, "_pipeline": pipeline}
        options["low_cpu_mem_usage"] = True  # no weights are drawn that the file's would overwrite
        if any(key.startswith("unet.") for key in held):
            pipeline.load_lora_into_unet(held, unet=pipeline.unet, **options)
        for part in _TEXT_ENCODERS:
            encoder = getattr(pipeline, part, None)
            if encoder is not None and any(key.startswith(f"{part}.") for key in held):
                pipeline.load_lora_into_text_encoder(held, text_encoder=encoder, prefix=part, **options)
        return list(held)

    def unload(self) -> None:
        """Take all of them off again."""
        if self._loaded():
            self._pipeline.unload_lora_weights()
        self._scales.clear()

    def check_none(self, action: str) -> None:
        """Raise `UsageError` while a file is loaded."""
        loaded = self._loaded()
        if loaded:
            raise UsageError(
                f"{action}: the LoRA {sorted(loaded)[0]} is loaded, which the folder cannot hold: call unload_lora() "
                "before, or put it into the weights by pipeline.fuse_lora() and pipeline.unload_lora_weights()"
            )

    def _loaded(self) -> set[str]:
        return {name for names in self._pipeline.get_list_adapters().values() for name in names}

    def _new_name(self, path: Path) -> str:
        stem = re.sub(r"\W+", "_", path.stem) or "lora"
        numbers = range(2, len(self._scales) + 3)
        return next(name for name in (stem, *(f"{stem}_{number}" for number in numbers)) if name not in self._scales)

    def _check_complete(self, path: str | Path, name: str, expected: int) -> None:
        """Diffusers only logs what found no place."""
        parts = [part for part in self._pipeline.components.values() if isinstance(part, nn.Module)]
        placed = sum(name in getattr(module, "lora_A", {}) for part in parts for module in part.modules())
        if expected and placed == expected:
            return
        self._remove(name)
        raise CheckpointError(
            f"{path}: a LoRA file of another model ({placed} of its {expected} layers are in this one); none was loaded"
        )

    def _remove(self, name: str) -> None:
        if name not in self._loaded():
            return
        if self._scales:
            self._pipeline.delete_adapters(name)
        else:
            self._pipeline.unload_lora_weights()
