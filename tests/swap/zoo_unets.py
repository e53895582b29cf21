"""Other U-Nets and autoencoders of diffusers: Kandinsky, DeepFloyd, unCLIP, video."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AnimateDiffPipeline,
    DDIMScheduler,
    DDPMScheduler,
    IFPipeline,
    Kandinsky3UNet,
    KandinskyV22Pipeline,
    MotionAdapter,
    UNet2DConditionModel,
    UNetSpatioTemporalConditionModel,
    VQModel,
)
from torch import Tensor

from .zoo_base import Draw, Family, liven, quiet, seeded, unet_of
from .zoo_sd import SD1, prompts, text_encoder, unet_with, vae

IMAGE = 56  # width of an image embedding
SIMPLE = {  # what Kandinsky 2.2, DeepFloyd IF and unCLIP share
    "sample_size": 16,
    "down_block_types": ("ResnetDownsampleBlock2D", *["SimpleCrossAttnDownBlock2D"] * 3),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": (*["SimpleCrossAttnUpBlock2D"] * 3, "ResnetUpsampleBlock2D"),
    "block_out_channels": (32, 64, 96, 128),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "resnet_time_scale_shift": "scale_shift",
    "attention_head_dim": 32,
}
KANDINSKY22 = SIMPLE | {
    "out_channels": 8,
    "cross_attention_dim": 48,
    "encoder_hid_dim": IMAGE,
    "encoder_hid_dim_type": "image_proj",
    "addition_embed_type": "image",
}
DEEPFLOYD = SIMPLE | {
    "in_channels": 3,
    "out_channels": 6,
    "cross_attention_dim": 64,  # the norm of the texts has 32 groups
    "encoder_hid_dim": 40,
    "cross_attention_norm": "group_norm",
    "addition_embed_type": "text",
    "addition_embed_type_num_heads": 4,
    "act_fn": "gelu",
}
UNCLIP = SIMPLE | {"in_channels": 3, "out_channels": 6, "cross_attention_dim": 48, "class_embed_type": "identity"}
TEMPORAL = {  # Stable Video Diffusion; its transformers' norms have 32 groups
    "sample_size": 16,
    "block_out_channels": (32, 64, 96, 96),
    "layers_per_block": 1,
    "num_attention_heads": (1, 2, 3, 3),
    "cross_attention_dim": 48,
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 24,
    "num_frames": 5,
}
MOTION = {
    "block_out_channels": SD1["block_out_channels"],
    "motion_layers_per_block": 1,
    "motion_num_attention_heads": 2,
    "motion_norm_num_groups": 8,
    "motion_max_seq_length": 32,
    "use_motion_mid_block": True,
}
KANDINSKY3 = {
    "time_embedding_dim": 64,
    "groups": 8,
    "attention_head_dim": 16,
    "layers_per_block": 2,
    "block_out_channels": (32, 64, 96, 96),
    "cross_attention_dim": 48,
    "encoder_hid_dim": 40,
}


def simple_unet(config: dict[str, Any]) -> UNet2DConditionModel:
    return liven(UNet2DConditionModel(**config))


def learned_variance(schedule: str, **settings: Any) -> DDPMScheduler:
    return DDPMScheduler(beta_schedule=schedule, variance_type="learned_range", **settings)


def movq() -> VQModel:
    """The image decoder of Kandinsky 2.2, whose norms look at the code; they have 32 groups."""
    return liven(
        VQModel(
            block_out_channels=(32, 32, 64, 64),
            down_block_types=(*["DownEncoderBlock2D"] * 3, "AttnDownEncoderBlock2D"),
            up_block_types=("AttnUpDecoderBlock2D", *["UpDecoderBlock2D"] * 3),
            latent_channels=4,
            vq_embed_dim=4,
            num_vq_embeddings=64,
            norm_type="spatial",
            layers_per_block=1,
        )
    )


@seeded
def build_kandinsky22() -> KandinskyV22Pipeline:
    scheduler = learned_variance("linear", beta_start=0.00085, beta_end=0.012, clip_sample=False)
    return quiet(KandinskyV22Pipeline(simple_unet(KANDINSKY22), scheduler, movq()))


@torch.no_grad()
def run_kandinsky22(pipe: Any) -> Tensor:
    draw = Draw(pipe.unet)
    embeds = {name: draw.normal(2, IMAGE) for name in ("image_embeds", "negative_image_embeds")}
    settings = {"num_inference_steps": 2, "guidance_scale": 4.0, "output_type": "latent"}
    generator = torch.Generator().manual_seed(3)
    noise = draw.normal(2, 4, 16, 24)
    return pipe(**embeds, height=128, width=192, latents=noise, generator=generator, **settings).images


@seeded
def build_movq() -> VQModel:
    return movq()


@torch.no_grad()
def run_movq(model: Any) -> Tensor:
    code = model.encode(Draw(model).normal(2, 3, 64, 88)).latents
    # As in the pipeline; rounding to the nearest code would turn a tiny difference into a large one.
    return model.decode(code, force_not_quantize=True).sample


@seeded
def build_deepfloyd() -> IFPipeline:
    scheduler = learned_variance(
        "squaredcos_cap_v2", thresholding=True, dynamic_thresholding_ratio=0.95, sample_max_value=1.5
    )
    absent = dict.fromkeys(("tokenizer", "text_encoder", "safety_checker", "feature_extractor", "watermarker"))
    return quiet(IFPipeline(**absent, unet=simple_unet(DEEPFLOYD), scheduler=scheduler, requires_safety_checker=False))


@torch.no_grad()
def run_deepfloyd(pipe: Any) -> Tensor:
    draw = Draw(pipe.unet)
    texts = {name: draw.normal(2, 77, 40) for name in ("prompt_embeds", "negative_prompt_embeds")}
    settings = {"num_inference_steps": 2, "guidance_scale": 7.0, "output_type": "pt"}
    generator = torch.Generator().manual_seed(3)
    return pipe(**texts, height=32, width=32, generator=generator, **settings).images


@seeded
def build_unclip() -> UNet2DConditionModel:
    return simple_unet(UNCLIP)


@torch.no_grad()
def run_unclip(model: Any) -> Tensor:
    """The decoder of Karlo: four tokens of the image before a padded text."""
    draw = Draw(model)
    noise, tokens, classes = draw.normal(2, 3, 16, 24), draw.normal(2, 81, 48), draw.normal(2, 128)
    mask = draw.lengths(4 + 77, 4 + 9).bool()
    return model(noise, 500, tokens, class_labels=classes, attention_mask=mask).sample


@seeded
def build_animatediff() -> AnimateDiffPipeline:
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="linear", clip_sample=False, steps_offset=1
    )
    pipe = AnimateDiffPipeline(
        vae=vae(),
        text_encoder=text_encoder(),
        tokenizer=None,
        unet=unet_with(SD1),
        motion_adapter=liven(MotionAdapter(**MOTION), louder=1.5),
        scheduler=scheduler,
    )
    pipe.unet.eval()  # put together from both, in training mode
    return quiet(pipe)


@torch.no_grad()
def run_animatediff(pipe: Any) -> Tensor:
    draw = Draw(pipe.unet)
    texts = {name: rows[:1] for name, rows in prompts(pipe, draw).items()}
    settings = {"num_inference_steps": 2, "guidance_scale": 7.5, "output_type": "latent"}
    return pipe(**texts, num_frames=5, height=128, width=96, latents=draw.normal(1, 4, 5, 16, 12), **settings).frames


@seeded
def build_svd() -> UNetSpatioTemporalConditionModel:
    return liven(UNetSpatioTemporalConditionModel(**TEMPORAL), louder=1.5)


@torch.no_grad()
def run_svd(model: Any) -> Tensor:
    draw = Draw(model)
    ids = torch.tensor([[6.0, 127, 0.02]] * 2).to(draw.device, draw.dtype)
    return model(draw.normal(2, 5, 8, 16, 12), 1.2, draw.normal(2, 1, 48), added_time_ids=ids).sample


@seeded
def build_kandinsky3() -> Kandinsky3UNet:
    return liven(Kandinsky3UNet(**KANDINSKY3))


@torch.no_grad()
def run_kandinsky3(model: Any) -> Tensor:
    draw = Draw(model)
    texts, mask = draw.normal(2, 61, 40), draw.lengths(61, 17).bool()
    return model(draw.normal(2, 4, 16, 24), 500, texts, encoder_attention_mask=mask).sample


FAMILIES = {
    "kandinsky22": Family("Kandinsky 2.2", "diffusers", build_kandinsky22, run_kandinsky22, unet_of),
    "movq": Family("Kandinsky 2.2 MoVQ", "diffusers", build_movq, run_movq),
    "deepfloyd_if": Family("DeepFloyd IF", "diffusers", build_deepfloyd, run_deepfloyd, unet_of),
    "unclip": Family("unCLIP (Karlo)", "diffusers", build_unclip, run_unclip),
    "animatediff": Family("AnimateDiff", "diffusers", build_animatediff, run_animatediff, unet_of),
    "svd": Family("Stable Video Diffusion", "diffusers", build_svd, run_svd),
    "kandinsky3": Family("Kandinsky 3", "diffusers", build_kandinsky3, run_kandinsky3),
}
