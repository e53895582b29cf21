"""Diffusion transformers of diffusers."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    CogVideoXTransformer3DModel,
    FluxTransformer2DModel,
    HunyuanVideoTransformer3DModel,
    PixArtTransformer2DModel,
    QwenImageTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    WanTransformer3DModel,
)
from torch import Tensor

from .zoo_base import Draw, Family, liven, seeded

TEXT = 48  # width of the texts' states
POOLED = 40
PIXART = {
    "sample_size": 32,
    "num_layers": 3,
    "num_attention_heads": 2,
    "attention_head_dim": 72,
    "cross_attention_dim": 144,
    "caption_channels": TEXT,
}
SD3 = {
    "sample_size": 32,
    "num_layers": 3,
    "num_attention_heads": 3,
    "attention_head_dim": 32,
    "joint_attention_dim": TEXT,
    "caption_projection_dim": 96,
    "pooled_projection_dim": POOLED,
    "pos_embed_max_size": 24,
}
SD35 = SD3 | {"num_layers": 4, "dual_attention_layers": (0, 1), "qk_norm": "rms_norm"}
FLUX = {
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 3,
    "num_attention_heads": 3,
    "attention_head_dim": 32,
    "joint_attention_dim": TEXT,
    "pooled_projection_dim": POOLED,
    "guidance_embeds": True,
    "axes_dims_rope": (4, 14, 14),
}
WAN = {
    "num_layers": 2,
    "num_attention_heads": 3,
    "attention_head_dim": 24,
    "text_dim": TEXT,
    "freq_dim": 32,
    "ffn_dim": 160,
}
WAN_IMAGE = WAN | {"in_channels": 36, "image_dim": 56, "added_kv_proj_dim": 72}
SANA = {
    "sample_size": 8,
    "num_layers": 3,
    "num_attention_heads": 5,
    "attention_head_dim": 16,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 40,
    "cross_attention_dim": 80,
    "caption_channels": TEXT,
}
QWENIMAGE = {
    "in_channels": 16,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 3,
    "joint_attention_dim": TEXT,
    "axes_dims_rope": (8, 4, 4),
}
HUNYUAN_VIDEO = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 10,
    "num_layers": 1,
    "num_single_layers": 1,
    "num_refiner_layers": 1,
    "patch_size_t": 1,
    "text_embed_dim": TEXT,
    "pooled_projection_dim": POOLED,
    "rope_axes_dim": (2, 4, 4),
}
COGVIDEOX = {
    "num_layers": 2,
    "num_attention_heads": 3,
    "attention_head_dim": 32,
    "time_embed_dim": 32,
    "text_embed_dim": TEXT,
    "sample_width": 12,
    "sample_height": 8,
    "sample_frames": 9,
    "max_text_seq_length": 61,
}


@seeded
def build_pixart() -> PixArtTransformer2DModel:
    return liven(PixArtTransformer2DModel(**PIXART), louder=2)


@torch.no_grad()
def run_pixart(model: Any) -> Tensor:
    draw = Draw(model)
    texts, mask = draw.normal(2, 61, TEXT), draw.lengths(61, 13)
    sizes = {"resolution": None, "aspect_ratio": None}
    times = torch.tensor([500, 500], device=draw.device)
    noise = draw.normal(2, 4, 24, 32)
    return model(noise, texts, times, sizes, encoder_attention_mask=mask).sample


@seeded
def build_sd3() -> SD3Transformer2DModel:
    return liven(SD3Transformer2DModel(**SD3), louder=2)


@seeded
def build_sd35() -> SD3Transformer2DModel:
    return liven(SD3Transformer2DModel(**SD35), louder=2)


@torch.no_grad()
def run_sd3(model: Any) -> Tensor:
    draw = Draw(model)
    texts, pooled = draw.normal(2, 77 + 61, TEXT), draw.normal(2, POOLED)  # of CLIP, then of T5
    times = torch.tensor([500.0, 500.0], device=draw.device)
    return model(draw.normal(2, 16, 24, 32), texts, pooled, times).sample


@seeded
def build_flux() -> FluxTransformer2DModel:
    return liven(FluxTransformer2DModel(**FLUX), louder=2)


@torch.no_grad()
def run_flux(model: Any) -> Tensor:
    draw = Draw(model)
    rows, columns = 9, 12
    places = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"), -1).view(-1, 2)
    image_ids = torch.nn.functional.pad(places, (1, 0)).to(draw.device, draw.dtype)
    return model(
        hidden_states=draw.normal(2, rows * columns, 16),
        encoder_hidden_states=draw.normal(2, 61, TEXT),
        pooled_projections=draw.normal(2, POOLED),
        timestep=torch.tensor([0.5, 0.5]).to(draw.device, draw.dtype),
        guidance=torch.tensor([3.5, 3.5], device=draw.device),
        img_ids=image_ids,
        txt_ids=torch.zeros(61, 3).to(draw.device, draw.dtype),
    ).sample


@seeded
def build_wan() -> WanTransformer3DModel:
    return liven(WanTransformer3DModel(**WAN), louder=2)


@torch.no_grad()
def run_wan(model: Any) -> Tensor:
    draw = Draw(model)
    times = torch.tensor([500, 500], device=draw.device)
    return model(draw.normal(2, 16, 3, 8, 12), times, draw.normal(2, 61, TEXT)).sample


@seeded
def build_wan_image() -> WanTransformer3DModel:
    return liven(WanTransformer3DModel(**WAN_IMAGE), louder=2)


@torch.no_grad()
def run_wan_image(model: Any) -> Tensor:
    draw = Draw(model)
    times = torch.tensor([500, 500], device=draw.device)
    # Stock takes the last 512 states for the text's, however many there are, and those before for the image's.
    noise, texts, images = draw.normal(2, 36, 3, 8, 12), draw.normal(2, 512, TEXT), draw.normal(2, 257, 56)
    return model(noise, times, texts, encoder_hidden_states_image=images).sample


@seeded
def build_sana() -> SanaTransformer2DModel:
    return liven(SanaTransformer2DModel(**SANA), louder=2)


@torch.no_grad()
def run_sana(model: Any) -> Tensor:
    draw = Draw(model)
    times = torch.tensor([500, 500], device=draw.device)
    texts, mask = draw.normal(2, 61, TEXT), draw.lengths(61, 13)
    return model(draw.normal(2, 32, 8, 12), texts, times, encoder_attention_mask=mask).sample


@seeded
def build_qwenimage() -> QwenImageTransformer2DModel:
    return liven(QwenImageTransformer2DModel(**QWENIMAGE), louder=2)


@torch.no_grad()
def run_qwenimage(model: Any) -> Tensor:
    draw = Draw(model)
    rows, columns = 4, 6
    return model(
        hidden_states=draw.normal(2, rows * columns, 16),
        encoder_hidden_states=draw.normal(2, 21, TEXT),
        encoder_hidden_states_mask=draw.lengths(21, 13),
        timestep=torch.tensor([0.5, 0.5]).to(draw.device, draw.dtype),
        img_shapes=[[(1, rows, columns)]] * 2,
    ).sample


@seeded
def build_hunyuan_video() -> HunyuanVideoTransformer3DModel:
    return liven(HunyuanVideoTransformer3DModel(**HUNYUAN_VIDEO), louder=2)


@torch.no_grad()
def run_hunyuan_video(model: Any) -> Tensor:
    draw = Draw(model)
    return model(
        hidden_states=draw.normal(2, 4, 2, 8, 12),
        timestep=torch.tensor([500, 500], device=draw.device),
        encoder_hidden_states=draw.normal(2, 21, TEXT),
        encoder_attention_mask=draw.lengths(21, 13),
        pooled_projections=draw.normal(2, POOLED),
        guidance=torch.tensor([6000.0, 6000.0]).to(draw.device, draw.dtype),
    ).sample


@seeded
def build_cogvideox() -> CogVideoXTransformer3DModel:
    return liven(CogVideoXTransformer3DModel(**COGVIDEOX), louder=2)


@torch.no_grad()
def run_cogvideox(model: Any) -> Tensor:
    draw = Draw(model)
    times = torch.tensor([500, 500], device=draw.device)
    return model(draw.normal(2, 3, 16, 8, 12), draw.normal(2, 61, TEXT), times).sample


def transformer(name: str, build: Any, run: Any) -> Family:
    return Family(name, "diffusers", build, run)


FAMILIES = {
    "pixart": transformer("PixArt-α", build_pixart, run_pixart),
    "sd3": transformer("Stable Diffusion 3", build_sd3, run_sd3),
    "sd35": transformer("Stable Diffusion 3.5", build_sd35, run_sd3),
    "flux": transformer("FLUX.1", build_flux, run_flux),
    "wan": transformer("Wan 2.1, text to video", build_wan, run_wan),
    "wan_i2v": transformer("Wan 2.1, image to video", build_wan_image, run_wan_image),
    "qwenimage": transformer("QwenImage", build_qwenimage, run_qwenimage),
    "hunyuan_video": transformer("HunyuanVideo", build_hunyuan_video, run_hunyuan_video),
    "sana": transformer("Sana", build_sana, run_sana),
    "cogvideox": transformer("CogVideoX", build_cogvideox, run_cogvideox),
}
