"""Stable Diffusion: pipelines of its versions, with ControlNet, IP-Adapters and LoRA."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionUpscalePipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from peft import LoraConfig
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from .zoo_base import Draw, Family, liven, quiet, seeded, unet_of

TEXT = 48  # width of the text encoder
HEIGHT, WIDTH = 128, 96  # of the picture; latents are an eighth
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SD1 = {
    "sample_size": 16,
    "block_out_channels": (40, 80, 160, 160),
    "layers_per_block": 1,
    "attention_head_dim": 2,  # the number of heads, in spite of its name
    "cross_attention_dim": TEXT,
    "norm_num_groups": 8,
}
SD1_WIDE = SD1 | {"block_out_channels": (80, 160, 320, 320)}  # the real head sizes: 40, 80 and 160
SD2 = {
    "sample_size": 24,
    "block_out_channels": (32, 64, 96, 96),
    "layers_per_block": 2,
    "attention_head_dim": (1, 2, 3, 3),
    "cross_attention_dim": TEXT,
    "norm_num_groups": 8,
    "use_linear_projection": True,
    "upcast_attention": True,
}
SDXL = {
    "sample_size": 16,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (32, 64, 96),
    "layers_per_block": 1,
    "transformer_layers_per_block": (1, 2, 3),
    "attention_head_dim": (1, 2, 3),
    "cross_attention_dim": 2 * TEXT,  # two text encoders side by side
    "norm_num_groups": 8,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 40 + 6 * 8,
}
UPSCALE = {
    "sample_size": 16,
    "in_channels": 7,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (32, 64, 64, 128),
    "layers_per_block": 1,
    "attention_head_dim": 4,
    "cross_attention_dim": TEXT,
    "norm_num_groups": 8,
    "use_linear_projection": True,
    "only_cross_attention": (True, True, True, False),
    "num_class_embeds": 1000,
}


def vae(levels: int = 4, scaling_factor: float = 0.18215) -> AutoencoderKL:
    """The first Stable Diffusion's image encoder and decoder; the upscaler's has a level less."""
    return liven(
        AutoencoderKL(
            block_out_channels=(16, 24, 32, 32)[:levels],
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=8,
            sample_size=64,
            scaling_factor=scaling_factor,
        )
    )


def text_encoder() -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=101,
        hidden_size=TEXT,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=3,
        projection_dim=TEXT,
        bos_token_id=99,
        eos_token_id=100,
        pad_token_id=100,
    )
    return liven(CLIPTextModel(config))


def parts(unet: UNet2DConditionModel, prediction_type: str = "epsilon") -> dict[str, Any]:
    """What a Stable Diffusion pipeline takes, less a tokenizer: prompts come as embeddings."""
    scheduler = DDIMScheduler(
        **BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1, prediction_type=prediction_type
    )
    return {
        "unet": unet,
        "scheduler": scheduler,
        "vae": vae(),
        "text_encoder": text_encoder(),
        "tokenizer": None,
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


def unet_with(config: dict[str, Any], **changes: Any) -> UNet2DConditionModel:
    return liven(UNet2DConditionModel(**config | changes), louder=1.5)


def prompts(pipe: Any, draw: Draw) -> dict[str, Tensor]:
    """Two prompts with a negative each, through the text encoder."""
    rows = [pipe.text_encoder(draw.integers(99, 2, 77))[0] for _ in range(2)]
    return {"prompt_embeds": rows[0], "negative_prompt_embeds": rows[1]}


@torch.no_grad()
def run_pipeline(pipe: Any, *, steps: int = 2, output_type: str = "latent", **inputs: Any) -> Tensor:
    """Two pictures of a pipeline that takes prompts and latents."""
    draw = Draw(pipe.unet)
    texts = prompts(pipe, draw)
    noise = draw.normal(2, 4, HEIGHT // 8, WIDTH // 8)
    settings = {"num_inference_steps": steps, "guidance_scale": 7.5, "output_type": output_type}
    return pipe(**texts, latents=noise, height=HEIGHT, width=WIDTH, **settings, **inputs).images


@seeded
def build_sd1() -> StableDiffusionPipeline:
    return quiet(StableDiffusionPipeline(**parts(unet_with(SD1_WIDE))))


@seeded
def build_sd2() -> StableDiffusionPipeline:
    return quiet(StableDiffusionPipeline(**parts(unet_with(SD2), "v_prediction")))


def run_sd1(pipe: Any) -> Tensor:
    return run_pipeline(pipe, steps=3, output_type="pt")


@seeded
def build_sdxl() -> StableDiffusionXLPipeline:
    scheduler = EulerDiscreteScheduler(**BETAS, timestep_spacing="leading", steps_offset=1)
    encoders = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    pipe = StableDiffusionXLPipeline(
        vae=vae(scaling_factor=0.13025), unet=unet_with(SDXL), scheduler=scheduler, add_watermarker=False, **encoders
    )
    return quiet(pipe)


@torch.no_grad()
def run_sdxl(pipe: Any) -> Tensor:
    draw = Draw(pipe.unet)
    texts = {name: draw.normal(2, 77, 2 * TEXT) for name in ("prompt_embeds", "negative_prompt_embeds")}
    pooled = {name: draw.normal(2, 40) for name in ("pooled_prompt_embeds", "negative_pooled_prompt_embeds")}
    settings = {"num_inference_steps": 2, "guidance_scale": 5.0, "output_type": "latent"}
    noise = draw.normal(2, 4, HEIGHT // 8, WIDTH // 8)
    return pipe(**texts, **pooled, latents=noise, height=HEIGHT, width=WIDTH, **settings).images


@seeded
def build_controlnet() -> StableDiffusionControlNetPipeline:
    config = {name: value for name, value in SD1.items() if name != "sample_size"}
    control = liven(ControlNetModel(**config, conditioning_embedding_out_channels=(8, 16, 24, 32)))
    return quiet(StableDiffusionControlNetPipeline(**parts(unet_with(SD1)), controlnet=control))


def run_controlnet(pipe: Any) -> Tensor:
    picture = Draw(pipe.unet, seed=2).normal(2, 3, HEIGHT, WIDTH).sigmoid()
    return run_pipeline(pipe, image=picture, controlnet_conditioning_scale=0.8)


@seeded
def build_inpaint() -> StableDiffusionInpaintPipeline:
    return quiet(StableDiffusionInpaintPipeline(**parts(unet_with(SD1, in_channels=9))))


def run_inpaint(pipe: Any) -> Tensor:
    picture = Draw(pipe.unet, seed=2).normal(1, 3, HEIGHT, WIDTH).sigmoid()
    mask = torch.zeros(1, 1, HEIGHT, WIDTH)
    mask[..., 24:88, 16:] = 1
    generator = torch.Generator().manual_seed(3)  # the encoder samples
    return run_pipeline(pipe, image=picture, mask_image=mask, generator=generator)


@seeded
def build_upscale() -> StableDiffusionUpscalePipeline:
    values = parts(unet_with(UPSCALE), "v_prediction") | {"vae": vae(3, 0.08333)}
    del values["requires_safety_checker"]  # a setting this pipeline lacks
    noising = DDPMScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="scaled_linear")
    return quiet(StableDiffusionUpscalePipeline(**values, low_res_scheduler=noising))


@torch.no_grad()
def run_upscale(pipe: Any) -> Tensor:
    draw = Draw(pipe.unet)
    texts = prompts(pipe, draw)
    picture = draw.normal(2, 3, 16, 12).sigmoid()
    noise = draw.normal(2, 4, 16, 12)
    settings = {"num_inference_steps": 2, "guidance_scale": 7.5, "noise_level": 20, "output_type": "latent"}
    generator = torch.Generator().manual_seed(3)  # noise on the small picture
    return pipe(image=picture, latents=noise, generator=generator, **texts, **settings).images


def adapter_layers(unet: UNet2DConditionModel) -> dict[str, Tensor]:
    """The key and value weights of an IP-Adapter's file for every cross-attention of a U-Net."""
    attentions = [name.removesuffix(".processor") for name in unet.attn_processors if "attn2" in name]
    layers = {}
    for number, name in enumerate(attentions):
        shape = unet.get_submodule(name).to_k.weight.shape
        for role, scale in (("k", 2), ("v", 1)):
            layers[f"{2 * number + 1}.to_{role}_ip.weight"] = scale * torch.randn(shape) * shape[1] ** -0.5
    return layers


def plain_projection(image_width: int = 56, tokens: int = 4) -> dict[str, Tensor]:
    """The image projection of an IP-Adapter's file: four tokens from one vector."""
    layers = nn.ModuleDict({"proj": nn.Linear(image_width, tokens * TEXT), "norm": nn.LayerNorm(TEXT)})
    return layers.state_dict()


def plus_projection(image_width: int = 52, tokens: int = 7, inner: int = 64) -> dict[str, Tensor]:
    """That of an IP-Adapter Plus: a resampler of four layers over the image encoder's tokens."""
    layers: dict[str, nn.Module] = {
        "proj_in": nn.Linear(image_width, inner),
        "proj_out": nn.Linear(inner, TEXT),
        "norm_out": nn.LayerNorm(TEXT),
    }
    for depth in range(4):
        layers |= {
            f"layers.{depth}.0.norm1": nn.LayerNorm(inner),
            f"layers.{depth}.0.norm2": nn.LayerNorm(inner),
            f"layers.{depth}.0.to_q": nn.Linear(inner, inner, bias=False),
            f"layers.{depth}.0.to_kv": nn.Linear(inner, 2 * inner, bias=False),
            f"layers.{depth}.0.to_out": nn.Linear(inner, inner, bias=False),
            f"layers.{depth}.1.0": nn.LayerNorm(inner),
            f"layers.{depth}.1.1": nn.Linear(inner, 4 * inner, bias=False),
            f"layers.{depth}.1.3": nn.Linear(4 * inner, inner, bias=False),
        }
    weights = {f"{name}.{key}": value for name, layer in layers.items() for key, value in layer.state_dict().items()}
    return weights | {"latents": torch.randn(1, tokens, inner)}


def load_adapters(pipe: Any, projections: list[dict[str, Tensor]], scales: list[Any]) -> Any:
    files = [{"image_proj": projection, "ip_adapter": adapter_layers(pipe.unet)} for projection in projections]
    blanks = [None] * len(files)  # dicts stand for folders, so there are no names
    pipe.load_ip_adapter(files, subfolder=blanks, weight_name=blanks, image_encoder_folder=None)
    pipe.set_ip_adapter_scale(scales)
    liven(pipe.unet.encoder_hid_proj)
    pipe.unet.eval()  # the new layers come in training mode
    return pipe


@seeded
def build_ip_adapter() -> StableDiffusionPipeline:
    pipe = quiet(StableDiffusionPipeline(**parts(unet_with(SD1))))
    return load_adapters(pipe, [plain_projection(), plus_projection()], [0.7, 0.4])


def run_ip_adapter(pipe: Any) -> Tensor:
    draw = Draw(pipe.unet, seed=4)
    images = [draw.normal(2, 1, 56), draw.normal(2, 1, 17, 52)]  # negative and positive, which all prompts share
    return run_pipeline(pipe, ip_adapter_image_embeds=images)


@seeded
def build_ip_masks() -> StableDiffusionPipeline:
    pipe = quiet(StableDiffusionPipeline(**parts(unet_with(SD1))))
    return load_adapters(pipe, [plain_projection(), plus_projection()], [[0.7, 0.5], 0.4])


def run_ip_masks(pipe: Any) -> Tensor:
    draw = Draw(pipe.unet, seed=4)
    images = [draw.normal(2, 2, 56), draw.normal(2, 1, 17, 52)]  # two images for the first adapter
    masks = [torch.zeros(1, 2, HEIGHT, WIDTH), torch.zeros(1, 1, HEIGHT, WIDTH)]
    masks[0][:, 0, :, : WIDTH // 2] = 1
    masks[0][:, 1, HEIGHT // 4 :, WIDTH // 3 :] = 1
    masks[1][:, 0, : HEIGHT // 2] = 1
    return run_pipeline(pipe, ip_adapter_image_embeds=images, cross_attention_kwargs={"ip_adapter_masks": masks})


@seeded
def build_lora() -> StableDiffusionPipeline:
    pipe = quiet(StableDiffusionPipeline(**parts(unet_with(SD1))))
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    pipe.unet.add_adapter(LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, target_modules=targets))
    pipe.unet.eval()
    return pipe


def run_lora(pipe: Any) -> Tensor:
    return run_pipeline(pipe, cross_attention_kwargs={"scale": 0.5})


@seeded
def build_vae() -> AutoencoderKL:
    return vae()


@torch.no_grad()
def run_vae(model: Any) -> Tensor:
    picture = Draw(model).normal(2, 3, 64, 88)
    return model.decode(model.encode(picture).latent_dist.mode()).sample


def pipeline(name: str, build: Any, run: Any) -> Family:
    return Family(name, "diffusers", build, run, unet_of)


FAMILIES = {
    "sd1": pipeline("Stable Diffusion 1.x", build_sd1, run_sd1),
    "sd2": pipeline("Stable Diffusion 2.x", build_sd2, run_pipeline),
    "sdxl": pipeline("Stable Diffusion XL", build_sdxl, run_sdxl),
    "sd1_controlnet": pipeline("Stable Diffusion 1.x with ControlNet", build_controlnet, run_controlnet),
    "sd1_ip_adapter": pipeline("Stable Diffusion 1.x with two IP-Adapters", build_ip_adapter, run_ip_adapter),
    "sd1_ip_masks": pipeline("Stable Diffusion 1.x with masked IP-Adapters", build_ip_masks, run_ip_masks),
    "sd1_lora": pipeline("Stable Diffusion 1.x with LoRA", build_lora, run_lora),
    "inpaint": pipeline("Stable Diffusion inpainting", build_inpaint, run_inpaint),
    "upscale": pipeline("Stable Diffusion x4 upscaler", build_upscale, run_upscale),
    "vae": Family("Stable Diffusion autoencoder", "diffusers", build_vae, run_vae),
}
