"""Whole diffusers pipelines with our U-Net beside the same with stock's: pictures within one step of a byte."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionImg2ImgPipeline
from torch import Tensor

from mmattn import UNet
from mmattn.models.unet import UNetContext
from mmattn.nn import CrossAttention
from tests.swap import zoo_sd
from tests.swap.zoo_base import Draw, quiet, seeded
from tests.swap.zoo_sd import HEIGHT, SD1, WIDTH, parts, prompts, run_pipeline, unet_with

STEP = 1 / 255


@seeded
def build_img2img() -> StableDiffusionImg2ImgPipeline:
    return quiet(StableDiffusionImg2ImgPipeline(**parts(unet_with(SD1))))


@torch.no_grad()
def run_img2img(pipe: Any) -> Tensor:
    picture = Draw(pipe.unet, seed=2).normal(2, 3, HEIGHT, WIDTH).sigmoid()
    settings = {"strength": 0.7, "num_inference_steps": 4, "guidance_scale": 7.5, "output_type": "latent"}
    generator = torch.Generator().manual_seed(3)
    return pipe(image=picture, generator=generator, **prompts(pipe, Draw(pipe.unet)), **settings).images


PIPELINES: dict[str, tuple[Callable[[], Any], Callable[[Any], Tensor]]] = {
    "SD 1.5": (zoo_sd.build_sd1, zoo_sd.run_sd1),
    "SD 2.1": (zoo_sd.build_sd2, run_pipeline),
    "SDXL": (zoo_sd.build_sdxl, zoo_sd.run_sdxl),
    "ControlNet": (zoo_sd.build_controlnet, zoo_sd.run_controlnet),
    "inpainting": (zoo_sd.build_inpaint, zoo_sd.run_inpaint),
    "image to image": (build_img2img, run_img2img),
    "upscaler": (zoo_sd.build_upscale, zoo_sd.run_upscale),
}


@torch.no_grad()
def picture_of(pipe: Any, images: Tensor) -> Tensor:
    """Pixels from 0 to 1 of what a pipeline gave: latents have four channels."""
    if images.shape[1] == 4:
        images = (pipe.vae.decode(images / pipe.vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
    return images


def with_ours(pipe: Any) -> Any:
    pipe.register_modules(unet=UNet.from_stock(pipe.unet))
    return pipe


@functools.cache
def sd1() -> Any:
    return zoo_sd.quiet(zoo_sd.StableDiffusionPipeline(**parts(UNet.from_stock(seeded(lambda: unet_with(SD1))()))))


@pytest.mark.parametrize("kind", PIPELINES)
def test_pictures_are_stocks(kind: str) -> None:
    build, run = PIPELINES[kind]
    pipe = build()
    stock = picture_of(pipe, run(pipe))
    ours = picture_of(pipe, run(with_ours(pipe)))
    assert stock.std() > 0.02
    assert (ours - stock).abs().max() <= STEP
    assert pipe.unet.attn_processors == {}


def test_pictures_follow_the_prompt_and_the_seed() -> None:
    pipe = sd1()
    draw = Draw(pipe.unet, seed=7)
    latents = draw.normal(1, 4, HEIGHT // 8, WIDTH // 8)
    texts = {
        "prompt_embeds": draw.normal(1, 11, zoo_sd.TEXT),
        "negative_prompt_embeds": draw.normal(1, 11, zoo_sd.TEXT),
    }
    settings = {"num_inference_steps": 2, "guidance_scale": 7.5, "output_type": "pt", "height": HEIGHT, "width": WIDTH}
    with torch.no_grad():
        first = pipe(**texts, latents=latents, **settings).images
        other_prompt = pipe(**texts | {"prompt_embeds": -texts["prompt_embeds"]}, latents=latents, **settings).images
        other_seed = pipe(**texts, latents=-latents, **settings).images
        again = pipe(**texts, latents=latents, **settings).images
    assert torch.equal(first, again)
    assert (first - other_prompt).abs().max() > 4 * STEP
    assert (first - other_seed).abs().max() > 4 * STEP


@torch.no_grad()
def test_a_context_is_projected_once_per_generation() -> None:
    pipe = sd1()
    unet, scheduler = pipe.unet, pipe.scheduler
    draw, counts = Draw(unet), dict[str, int]()
    text, latents = draw.normal(2, 11, zoo_sd.TEXT), draw.normal(1, 4, HEIGHT // 8, WIDTH // 8)
    projected = unet.project_context(text)
    handles = [
        module.to_k.register_forward_hook(lambda *_, name=name: counts.update({name: counts.get(name, 0) + 1}))
        for name, module in unet.cross_attentions.items()
    ]
    results = []
    try:
        for given, wanted in ((text, 3), (UNetContext(text), 1), (projected, 0)):
            counts.clear()
            scheduler.set_timesteps(3)
            x = latents
            for step in scheduler.timesteps:
                noise = unet(torch.cat([x, x]), step, encoder_hidden_states=given).sample
                x = scheduler.step(noise[:1] + 5 * (noise[1:] - noise[:1]), step, x).prev_sample
            results.append(x)
            assert counts == (dict.fromkeys(unet.cross_attentions, wanted) if wanted else {})
    finally:
        for handle in handles:
            handle.remove()
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_what_pipelines_set_on_a_unet() -> None:
    pipe = zoo_sd.build_sd1()
    expected = run_pipeline(pipe)
    pipe = with_ours(pipe)
    pipe.enable_attention_slicing()
    pipe.disable_attention_slicing()
    pipe.disable_xformers_memory_efficient_attention()
    pipe.fuse_qkv_projections()
    assert all(module.is_fused for module in pipe.unet.modules() if isinstance(module, CrossAttention))
    torch.testing.assert_close(run_pipeline(pipe), expected)
    pipe.unfuse_qkv_projections()
    assert not any(module.is_fused for module in pipe.unet.modules() if isinstance(module, CrossAttention))
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.4, b2=1.6)
    free = run_pipeline(pipe)
    assert (free - expected).abs().max() > 1e-2
    pipe.disable_freeu()
    torch.testing.assert_close(run_pipeline(pipe), expected)


def test_freeu_comes_along_from_stock() -> None:
    pipe = zoo_sd.build_sd1()
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.4, b2=1.6)
    expected = run_pipeline(pipe)
    torch.testing.assert_close(run_pipeline(with_ours(pipe)), expected)


def test_a_controlnet_starts_from_ours() -> None:
    unet = sd1().unet
    control = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 16, 24, 32))
    for name, tensor in control.down_blocks.state_dict().items():
        assert torch.equal(tensor, unet.down_blocks.state_dict()[name])
