"""Attention maps of a diffusion model on scenes whose objects are known: true pictures, noised and read once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

from mmattn.data.scenes import SceneDataset
from mmattn.errors import UsageError
from mmattn.inference.diffusion.pixel_pipeline import PixelPipeline
from mmattn.inference.hub import evaluating
from mmattn.inference.map_scores import ScoredMap, object_maps
from mmattn.inference.text_to_image import TextToImage
from mmattn.maps.record import AttentionMaps, record_attention

_TIMES = (0.7, 0.5, 0.3)  # of the noise schedule: objects have places by then, and are not yet done
_AT_ONCE = 16


def scene_maps(t2i: TextToImage, source: SceneDataset, numbers: Sequence[int]) -> list[ScoredMap]:
    """Maps of the objects that captions name, by layer and head, averaged over three noise levels.

    What a model draws has objects of its own making; a true picture has known ones. So true pictures are noised, as in
    training, and the U-Net predicts once at each level.

    Raises:
        UsageError: a pipeline with an autoencoder: scenes are pixels.
    """
    pipeline = t2i.pipeline
    if not isinstance(pipeline, PixelPipeline):
        raise UsageError(f"maps are scored on scenes, which are pixels: {type(pipeline).__name__} draws latents")
    found: list[ScoredMap] = []
    with evaluating(pipeline.unet), evaluating(pipeline.text_encoder):
        for first in range(0, len(numbers), _AT_ONCE):
            chosen = list(numbers[first : first + _AT_ONCE])
            captions = [items[0].text for items in source.texts(chosen)]
            maps = _read(pipeline, source, chosen, captions)
            for place, (number, caption) in enumerate(zip(chosen, captions, strict=True)):
                found += object_maps(maps, place, caption, source.regions(number), number)
    return found


def _read(pipeline: PixelPipeline, source: SceneDataset, numbers: list[int], captions: list[str]) -> AttentionMaps:
    device = pipeline.unet.device
    pixels = torch.from_numpy(source.images(numbers)).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
    noise = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(numbers[0])).to(device)
    schedule: Any = DDPMScheduler.from_config(pipeline.scheduler.config)
    context = pipeline._context(pipeline.encode_prompt(captions), 1)
    factor = pipeline.config["pixel_unshuffle"]
    unet = pipeline.unet
    with record_attention(unet, prompts=captions, tokenizer=pipeline.tokenizer, views=["head"]) as maps:
        for share in _TIMES:
            time = torch.tensor(int(share * len(schedule.betas)), device=device)
            noisy = schedule.add_noise(pixels, noise, time.expand(len(pixels)))
            unet(F.pixel_unshuffle(noisy, factor).to(unet.dtype), time, **context)
    return maps
