"""LoRA adapters of a U-Net and its text encoders as the file that diffusers pipelines load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers.loaders.lora_pipeline import StableDiffusionXLLoraLoaderMixin
from torch import nn

from mmattn.errors import UsageError
from mmattn.models.checkpoints import replacing
from mmattn.training.selection import adapter_state, lora_config

LORA_FILE = "pytorch_lora_weights.safetensors"


def save_unet_lora(
    unet: nn.Module,
    folder: str | Path,
    text_encoder: nn.Module | None = None,
    text_encoder_2: nn.Module | None = None,
) -> Path:
    """Write the adapters that `add_lora` put in, for `pipe.load_lora_weights(folder)` of stock diffusers.

    Rank, alpha and targets are in the file's header, so that the loaded adapters have the strength they were trained
    with. A module without adapters is left out.

    Args:
        unet: `mmattn.UNet` or a stock `UNet2DConditionModel`; its module names are stock's either way.
        folder: made when it is not there; an earlier file is replaced when the new one is complete.
        text_encoder: the pipeline's text encoder, where it was adapted too.
        text_encoder_2: SDXL's second.

    Returns:
        The file, `pytorch_lora_weights.safetensors`.

    Raises:
        UsageError: none of the modules has adapters.
        CheckpointError: the disk refuses.
        OptionalPackageError: peft is not installed.
    """
    modules = {"unet": unet, "text_encoder": text_encoder, "text_encoder_2": text_encoder_2}
    adapted = {
        name: module for name, module in modules.items() if module is not None and lora_config(module) is not None
    }
    if not adapted:
        raise UsageError("no LoRA to save: neither the U-Net nor a text encoder has adapters of add_lora")
    file = Path(folder) / LORA_FILE
    layers = {f"{name}_lora_layers": _tensors(module) for name, module in adapted.items()}
    metadata = {f"{name}_lora_adapter_metadata": lora_config(module).to_dict() for name, module in adapted.items()}
    with replacing(file) as part:
        # SDXL's form, with two text encoders, writes all that the other does.
        StableDiffusionXLLoraLoaderMixin.save_lora_weights(file.parent, **layers, **metadata, weight_name=part.name)
    return file


def _tensors(module: nn.Module) -> dict[str, Any]:
    return {name: tensor.contiguous() for name, tensor in adapter_state(module).items()}
