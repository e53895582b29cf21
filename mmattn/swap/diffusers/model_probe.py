"""Random inputs for a whole diffusers model, made from its config, so that `verify` can run it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mmattn.swap.diffusers.probe import place_of
from mmattn.swap.verify import probing, run_model

_BATCH, _TEXT = 2, 7
Random = Callable[..., Tensor]


def model_probe(model: nn.Module) -> Callable[[], Tensor] | None:
    """A function that runs the model on fixed random inputs and returns its output, and raises `ProbeError` where the
    model does not take them (processors of perturbed-attention guidance want thirds of a batch); None for a class, or
    a kind of conditioning, whose inputs are not known here."""
    build = BUILDERS.get(type(model).__name__)
    if build is None or build(model, torch.zeros) is None:
        return None

    def probe() -> Tensor:
        device, dtype = place_of(model)
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(device, dtype)

        inputs = build(model, random)
        assert inputs is not None
        placed = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
        with probing():
            return run_model(model, placed)

    return probe


def _unet(model: Any, random: Random) -> dict[str, Any] | None:
    config = model.config
    if config.encoder_hid_dim_type not in (None, "text_proj") or config.addition_embed_type not in (None, "text_time"):
        return None
    if config.class_embed_type not in (None, "timestep"):
        return None
    width = config.cross_attention_dim
    width = width[0] if isinstance(width, (list, tuple)) else width
    side = 2 ** len(config.block_out_channels)
    inputs: dict[str, Any] = {
        "sample": random(_BATCH, config.in_channels, side, side),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": random(_BATCH, _TEXT, config.encoder_hid_dim or width),
    }
    if config.num_class_embeds is not None or config.class_embed_type is not None:
        inputs["class_labels"] = torch.zeros(_BATCH, dtype=torch.long)
    if config.addition_embed_type == "text_time":
        numbers = 6
        pooled = config.projection_class_embeddings_input_dim - numbers * config.addition_time_embed_dim
        inputs["added_cond_kwargs"] = {"text_embeds": random(_BATCH, pooled), "time_ids": random(_BATCH, numbers)}
    return inputs


def _vae(model: Any, random: Random) -> dict[str, Any]:
    side = 8 * 2 ** (len(model.config.block_out_channels) - 1)
    return {"sample": random(1, model.config.in_channels, side, side)}


def _pixart(model: Any, random: Random) -> dict[str, Any] | None:
    config = model.config
    if model.use_additional_conditions:
        return None
    mask = torch.ones(_BATCH, _TEXT)
    mask[0, 3:] = 0
    return {
        "hidden_states": random(_BATCH, config.in_channels, config.sample_size, config.sample_size),
        "encoder_hidden_states": random(_BATCH, _TEXT, config.caption_channels or config.cross_attention_dim),
        "timestep": torch.full((_BATCH,), 500),
        "encoder_attention_mask": mask,
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def _sd3(model: Any, random: Random) -> dict[str, Any]:
    config = model.config
    return {
        "hidden_states": random(_BATCH, config.in_channels, 4 * config.patch_size, 4 * config.patch_size),
        "encoder_hidden_states": random(_BATCH, _TEXT, config.joint_attention_dim),
        "pooled_projections": random(_BATCH, config.pooled_projection_dim),
        "timestep": torch.full((_BATCH,), 500),
    }


def _flux(model: Any, random: Random) -> dict[str, Any]:
    config, side = model.config, 4
    places = torch.zeros(side * side, 3)
    places[:, 1] = torch.arange(side).repeat_interleave(side)
    places[:, 2] = torch.arange(side).repeat(side)
    return {
        "hidden_states": random(_BATCH, side * side, config.in_channels),
        "encoder_hidden_states": random(_BATCH, _TEXT, config.joint_attention_dim),
        "pooled_projections": random(_BATCH, config.pooled_projection_dim),
        "timestep": torch.full((_BATCH,), 0.5),
        "guidance": torch.ones(_BATCH) if config.guidance_embeds else None,
        "img_ids": places,
        "txt_ids": torch.zeros(_TEXT, 3),
    }


def _wan(model: Any, random: Random) -> dict[str, Any] | None:
    config = model.config
    if config.image_dim is not None:
        return None
    frames, height, width = (2 * size for size in config.patch_size)
    return {
        "hidden_states": random(_BATCH, config.in_channels, frames, 2 * height, 2 * width),
        "encoder_hidden_states": random(_BATCH, _TEXT, config.text_dim),
        "timestep": torch.full((_BATCH,), 500),
    }


BUILDERS: dict[str, Callable[[Any, Random], dict[str, Any] | None]] = {
    "UNet2DConditionModel": _unet,
    "AutoencoderKL": _vae,
    "PixArtTransformer2DModel": _pixart,
    "SD3Transformer2DModel": _sd3,
    "FluxTransformer2DModel": _flux,
    "WanTransformer3DModel": _wan,
}
