"""Stable Diffusion's text encoders behind the same door as any other."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DModel
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from mmattn.errors import CheckpointError
from mmattn.inference.diffusion.sd_text_encoding import sd_text_encodings
from tests.inference.tiny_text_encoders import LONG, TEXTS, text_config, word_tokenizer
from tests.swap.zoo_base import liven, quiet
from tests.swap.zoo_sd import SD1, SDXL, parts, unet_with, vae


def clip_pair(max_length: int = 77, *, projection: bool = False):
    tokenizer = word_tokenizer(max_length)
    model_class = CLIPTextModelWithProjection if projection else CLIPTextModel
    config = text_config(len(tokenizer), hidden_size=48, max_position_embeddings=77, projection_dim=40)
    return tokenizer, liven(model_class(config))


@pytest.fixture(scope="module")
def sd() -> StableDiffusionPipeline:
    tokenizer, encoder = clip_pair()
    return quiet(StableDiffusionPipeline(**parts(unet_with(SD1)) | {"text_encoder": encoder, "tokenizer": tokenizer}))


@pytest.fixture(scope="module")
def sdxl() -> StableDiffusionXLPipeline:
    (first, encoder), (second, encoder_2) = clip_pair(), clip_pair(projection=True)
    names = ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2")
    texts = dict(zip(names, (first, encoder, second, encoder_2), strict=True))
    scheduler = parts(None)["scheduler"]
    return StableDiffusionXLPipeline(vae=vae(), unet=unet_with(SDXL), scheduler=scheduler, **texts)


def test_stable_diffusion_1_and_2_attend_all_77_tokens(sd):
    encoding = sd_text_encodings(sd)
    text = encoding.encode_prompts([TEXTS[0], ""])
    wanted, negative = sd.encode_prompt(TEXTS[0], "cpu", 1, True, negative_prompt="")
    assert text.states.shape == (2, 77, encoding.width) == (2, 77, 48)
    torch.testing.assert_close(text.states, torch.cat([wanted, negative]))
    assert text.key_mask is None
    assert text.pooled is None
    assert encoding.cut([TEXTS[0], LONG + " star" * 80]) == [None, " ".join(["star"] * 17)]


def test_sdxl_has_two_encoders_and_a_pooled_state(sdxl):
    encoding = sd_text_encodings(sdxl)
    text = encoding.encode_prompts([TEXTS[0], ""])
    states, negative, pooled, negative_pooled = sdxl.encode_prompt(TEXTS[0], do_classifier_free_guidance=True)
    assert text.states.shape == (2, 77, encoding.width) == (2, 77, 96)
    torch.testing.assert_close(text.states, torch.cat([states, negative]))
    torch.testing.assert_close(text.pooled, torch.cat([pooled, negative_pooled]))
    assert not negative.any()  # what the pipeline does with a negative prompt that is not given
    assert text.pooled.shape == (2, 40)
    assert encoding.cut(["star " * 76]) == ["star"]


def test_the_fingerprint_of_a_pipeline_counts_both_encoders(sdxl):
    encoding = sd_text_encodings(sdxl)
    before = encoding.fingerprint()
    assert sd_text_encodings(sdxl).fingerprint() == before
    weight = sdxl.text_encoder_2.text_projection.weight
    with torch.no_grad():
        weight += 1
        assert encoding.fingerprint() != before
        weight -= 1


def test_pipelines_without_text_encoders_or_of_another_family_are_refused(sd):
    bare = StableDiffusionPipeline(**parts(sd.unet) | {"text_encoder": None})
    with pytest.raises(CheckpointError, match="has no text encoder with its tokenizer"):
        sd_text_encodings(bare)
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    unet = UNet2DModel(block_out_channels=(8,), norm_num_groups=8, **blocks)
    with pytest.raises(CheckpointError, match="DDPMPipeline is not a pipeline of Stable Diffusion"):
        sd_text_encodings(DDPMPipeline(unet, DDPMScheduler()))
