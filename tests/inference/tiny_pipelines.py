"""Small text-to-image pipelines with random weights, and folders of them."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from mmattn.inference.diffusion.text_encoder_setup import TextEncoderConfig, new_text_encoder
from tests.swap.zoo_base import liven, quiet, seeded
from tests.swap.zoo_sd import BETAS, SD1, SDXL, TEXT, parts, unet_with, vae

WORDS = "a red blue green circle square star above below no nothing and so on it goes with many more words"
PIXEL_UNET = {
    "sample_size": (6, 4),
    "in_channels": 12,
    "out_channels": 12,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (16, 24),
    "layers_per_block": 1,
    "attention_head_dim": 2,
    "cross_attention_dim": 20,
    "norm_num_groups": 4,
}


def pixel_parts(**unet: Any) -> dict[str, Any]:
    """Parts of a `PixelPipeline` of 12 x 8 pixels, the U-Net a stock one."""
    return seeded(lambda: _pixel_parts(unet))()


def _pixel_parts(unet: dict[str, Any]) -> dict[str, Any]:
    config = TextEncoderConfig(width=20, num_layers=1, num_heads=2, max_length=13)
    encoding = new_text_encoder([WORDS], config)
    scheduler = DDIMScheduler(num_train_timesteps=100, prediction_type="v_prediction", clip_sample=False)
    return {
        "unet": liven(UNet2DConditionModel(**PIXEL_UNET | unet), louder=2),
        "text_encoder": liven(encoding.encoder),
        "tokenizer": encoding.tokenizer,
        "scheduler": scheduler,
        "pixel_unshuffle": 2,
    }


def _tokenizer() -> Any:
    return new_text_encoder([WORDS], TextEncoderConfig(width=8, num_layers=0, num_heads=1, max_length=11)).tokenizer


def _text_config(tokenizer: Any, width: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=40,
        max_position_embeddings=11,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def stable_diffusion(**unet: Any) -> StableDiffusionPipeline:
    """Stable Diffusion 1.x, shrunken: pictures of 32 x 32."""
    return seeded(lambda: _stable_diffusion(unet))()


def _stable_diffusion(unet: dict[str, Any]) -> StableDiffusionPipeline:
    tokenizer = _tokenizer()
    encoder = liven(CLIPTextModel(_text_config(tokenizer, TEXT)))
    values = parts(unet_with(SD1 | {"sample_size": 4, "block_out_channels": (16, 24, 32, 32)} | unet))
    return quiet(StableDiffusionPipeline(**values | {"tokenizer": tokenizer, "text_encoder": encoder}))


@seeded
def stable_diffusion_xl() -> StableDiffusionXLPipeline:
    """Stable Diffusion XL, shrunken."""
    tokenizer = _tokenizer()
    pipe = StableDiffusionXLPipeline(
        vae=vae(scaling_factor=0.13025),
        unet=unet_with(SDXL | {"sample_size": 4}),
        scheduler=EulerDiscreteScheduler(**BETAS, timestep_spacing="leading", steps_offset=1),
        text_encoder=liven(CLIPTextModel(_text_config(tokenizer, TEXT))),
        text_encoder_2=liven(CLIPTextModelWithProjection(_text_config(tokenizer, TEXT))),
        tokenizer=tokenizer,
        tokenizer_2=_tokenizer(),
        add_watermarker=False,
    )
    return quiet(pipe)


def seeds(*numbers: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(number) for number in numbers]
