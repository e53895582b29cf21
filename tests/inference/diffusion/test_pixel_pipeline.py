"""The pixel-space pipeline: stock parts, padding masked, guidance, schedulers, folders and what it refuses."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UNet2DConditionModel,
)
from transformers import AutoTokenizer, CLIPTextModel

from mmattn.errors import CheckpointError, UsageError
from mmattn.inference.diffusion.pixel_pipeline import PixelPipeline
from mmattn.models.unet import UNet
from mmattn.nn import CrossAttention
from tests.inference.tiny_pipelines import pixel_parts, seeds
from tests.swap.zoo_base import quiet

PROMPTS = ["a red circle", "a blue square above a green star"]


@pytest.fixture(scope="module")
def parts():
    return pixel_parts()


@pytest.fixture(scope="module")
def stock(parts):
    return quiet(PixelPipeline(**parts))


@pytest.fixture(scope="module")
def ours(parts):
    return quiet(PixelPipeline(**parts | {"unet": UNet.from_stock(parts["unet"])}))


@pytest.fixture(scope="module")
def folder(ours, tmp_path_factory):
    place = tmp_path_factory.mktemp("pixels")
    ours.save_pretrained(place)
    return place


def draw(pipe, prompt=PROMPTS, **changes) -> torch.Tensor:
    count = len(prompt) if isinstance(prompt, list) else 1
    arguments = {"num_inference_steps": 3, "output_type": "pt", "generator": seeds(*range(count))} | changes
    return pipe(prompt, **arguments).images


def with_scheduler(pipe, cls, **settings) -> PixelPipeline:
    parts = pipe.components | {"scheduler": cls.from_config(pipe.scheduler.config, **settings)}
    return quiet(PixelPipeline(**parts, pixel_unshuffle=pipe.config.pixel_unshuffle))


@pytest.mark.parametrize(
    ("cls", "settings"),
    [
        (DDIMScheduler, {}),
        (DDIMScheduler, {"prediction_type": "epsilon", "clip_sample": True}),
        (DPMSolverMultistepScheduler, {"thresholding": True, "sample_max_value": 1.0}),
        (EulerDiscreteScheduler, {}),
        (EulerAncestralDiscreteScheduler, {}),
        (HeunDiscreteScheduler, {}),
    ],
)
def test_equals_a_stock_unet_in_every_scheduler(stock, ours, cls, settings):
    expected = draw(with_scheduler(stock, cls, **settings))
    found = draw(with_scheduler(ours, cls, **settings))
    assert expected.shape == (2, 3, 12, 8)
    assert expected.std() > 0.05
    torch.testing.assert_close(found, expected, atol=1 / 512, rtol=0)


def test_padding_and_company_do_not_count(ours):
    together = draw(ours, generator=seeds(7, 7))
    for number, prompt in enumerate(PROMPTS):
        torch.testing.assert_close(draw(ours, prompt, generator=seeds(7))[0], together[number], atol=1e-4, rtol=0)
    assert (together[0] - together[1]).abs().mean() > 0.01


def test_guidance_by_hand(ours):
    """The last step of guidance is `without + scale * (with - without)`, of two calls of the U-Net."""
    noise = torch.randn(1, 3, 12, 8, generator=torch.Generator().manual_seed(3))
    calls = []
    hook = ours.unet.register_forward_hook(lambda module, given, output: calls.append((given[0], output[0])))
    kept = []

    def keep(pipe, step, timestep, tensors):
        kept.append(tensors["latents"])
        return {}

    try:
        draw(ours, PROMPTS[0], latents=noise, guidance_scale=3.0, num_inference_steps=1, callback_on_step_end=keep)
        draw(ours, PROMPTS[0], latents=noise, guidance_scale=1.0, num_inference_steps=1)
        draw(ours, "", latents=noise, guidance_scale=1.0, num_inference_steps=1)
    finally:
        hook.remove()
    assert [given.shape[0] for given, _ in calls] == [2, 1, 1]
    (_, both), (_, prompted), (_, empty) = calls
    torch.testing.assert_close(both, torch.cat([empty, prompted]), atol=1e-5, rtol=1e-4)
    guided = torch.nn.functional.pixel_shuffle(empty + 3 * (prompted - empty), 2)
    timestep = ours.scheduler.timesteps[0]
    expected = ours.scheduler.step(guided, timestep, noise).prev_sample
    torch.testing.assert_close(kept[0], expected, atol=1e-4, rtol=1e-4)


def test_negative_prompts_and_images_per_prompt(ours):
    plain = draw(ours)
    assert not torch.equal(draw(ours, negative_prompt="green star"), plain)
    torch.testing.assert_close(draw(ours, negative_prompt=["", ""]), plain)
    both = draw(ours, num_images_per_prompt=2, generator=seeds(0, 5, 1, 6))
    torch.testing.assert_close(both[[0, 2]], plain, atol=1e-4, rtol=0)
    assert not torch.allclose(both[0], both[1], atol=0.01)
    rescaled = draw(ours, guidance_rescale=0.7)
    assert not torch.allclose(rescaled, plain, atol=1e-3)


def test_keys_and_values_are_projected_once(ours):
    layers = [module for module in ours.unet.modules() if isinstance(module, CrossAttention)]
    counts = {}
    hooks = [
        layer.get_submodule("to_k").register_forward_hook(
            lambda module, given, output: counts.__setitem__(module, counts.get(module, 0) + 1)
        )
        for layer in layers
    ]
    draw(ours, num_images_per_prompt=2, generator=seeds(0, 1, 2, 3), num_inference_steps=4)
    for hook in hooks:
        hook.remove()
    assert len(layers) == 4
    assert list(counts.values()) == [1] * 4


def test_embeddings_in_place_of_prompts(ours):
    with torch.no_grad():
        encoded, empty = ours.encode_prompt(PROMPTS), ours.encode_prompt(["", ""])
    assert encoded.key_mask.tolist()[0].count(True) < encoded.key_mask.shape[1]
    texts = {"prompt_embeds": encoded.states, "prompt_attention_mask": encoded.key_mask}
    texts |= {"negative_prompt_embeds": empty.states, "negative_prompt_attention_mask": empty.key_mask}
    torch.testing.assert_close(draw(ours, None, **texts, generator=seeds(0, 1)), draw(ours), atol=1e-5, rtol=0)


def test_sizes_and_output_types(ours):
    pictures = draw(ours, height=16, width=20)
    assert pictures.shape == (2, 3, 16, 20)
    assert pictures.min() >= 0
    assert pictures.max() <= 1
    assert draw(ours, output_type="np").shape == (2, 12, 8, 3)
    assert draw(ours, output_type="pil")[0].size == (8, 12)
    images = ours("a", num_inference_steps=1, output_type="pt", return_dict=False, generator=seeds(1))
    assert isinstance(images, tuple)
    assert images[0].shape == (1, 3, 12, 8)


def test_half_precision(parts):
    pipe = quiet(PixelPipeline(**pixel_parts())).to(torch.bfloat16)
    pictures = draw(pipe, output_type="np")
    assert pictures.shape == (2, 12, 8, 3)
    assert abs(pictures - draw(quiet(PixelPipeline(**parts)), output_type="np")).mean() < 0.05


def test_folder_opens_here_and_its_parts_in_stock_classes(ours, folder, caplog):
    with caplog.at_level(logging.WARNING):
        opened = quiet(PixelPipeline.from_pretrained(folder))
    assert not caplog.records
    assert isinstance(opened.unet, UNet)
    assert opened.config.pixel_unshuffle == 2
    torch.testing.assert_close(draw(opened), draw(ours), rtol=0, atol=0)
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "PixelPipeline"
    assert index["unet"] == ["diffusers", "UNet2DConditionModel"]
    assert index["text_encoder"] == ["transformers", "CLIPTextModel"]
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    encoder = CLIPTextModel.from_pretrained(folder, subfolder="text_encoder").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    scheduler = DDIMScheduler.from_pretrained(folder, subfolder="scheduler")
    rebuilt = quiet(PixelPipeline(unet.eval(), encoder, tokenizer, scheduler, pixel_unshuffle=2))
    torch.testing.assert_close(draw(rebuilt), draw(ours), atol=1 / 512, rtol=0)
    assert issubclass(PixelPipeline, DiffusionPipeline)


def test_a_callback_reads_the_guidance_scale_of_the_call(ours):
    seen = []

    def look(pipe, number, timestep, tensors):
        seen.append(pipe.guidance_scale)
        return tensors

    draw(ours, guidance_scale=7, callback_on_step_end=look)
    assert set(seen) == {7.0}
    assert quiet(PixelPipeline(**ours.components, pixel_unshuffle=2, guidance_scale=2)).guidance_scale == 2


def test_the_guidance_scale_of_its_own_is_saved(ours, tmp_path):
    parts = ours.components | {"guidance_scale": 2}
    quiet(PixelPipeline(**parts, pixel_unshuffle=2)).save_pretrained(tmp_path)
    opened = PixelPipeline.from_pretrained(tmp_path)
    drawn = draw(opened)
    assert opened.do_classifier_free_guidance
    torch.testing.assert_close(drawn, draw(ours, guidance_scale=2), rtol=0, atol=0)
    assert not torch.equal(drawn, draw(ours))
    torch.testing.assert_close(draw(ours), draw(ours, guidance_scale=5), rtol=0, atol=0)
    with pytest.raises(UsageError, match="guidance_scale is 0.5, which would be ignored"):
        PixelPipeline(**parts | {"guidance_scale": 0.5}, pixel_unshuffle=2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps is 0: it must be a whole number of 1 or more"),
        ({"num_inference_steps": 101}, "num_inference_steps is 101, but the model was trained with 100: take no more"),
        ({"height": 13}, "height is 13, but this model draws multiples of 2: take 12 or 14"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan: it must be a number of 0 or more"),
        ({"guidance_scale": 0.5}, "guidance_scale is 0.5, which would be ignored"),
        (
            {"guidance_scale": 1, "negative_prompt": "red"},
            "turns guidance off, so the negative prompts would be ignored",
        ),
        ({"output_type": "latent"}, "output_type is 'latent': choose one of pil, np, pt"),
        ({"negative_prompt": ["a", "b", "c"]}, "3 negative prompts for 2 prompts: give one, or one for each"),
        ({"generator": seeds(1)}, "1 generators for 2 pictures: give one, or one for each picture"),
        ({"latents": torch.zeros(1, 3, 12, 8)}, r"latents has shape \[1, 3, 12, 8\], expected \[2, 3, 12, 8\]"),
        ({"prompt_attention_mask": torch.ones(2, 3)}, "prompt_attention_mask belongs to prompt_embeds"),
        ({"prompt_embeds": torch.ones(2, 3, 20)}, "give either prompt or prompt_embeds, and not both"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "has 'noise': only 'latents' can be had"),
    ],
)
def test_bad_arguments(ours, changes, message):
    with pytest.raises(UsageError, match=message):
        draw(ours, **changes)


def test_bad_prompts_and_embeddings(ours):
    with pytest.raises(UsageError, match="no prompt were given: the list is empty"):
        draw(ours, [])
    with pytest.raises(UsageError, match="prompt: number 2 of 2 is a int, not a str"):
        draw(ours, ["a", 3])
    with pytest.raises(UsageError, match=r"prompt_embeds has shape \[1, 3, 24\], expected \[batch, length, 20\]"):
        ours(prompt_embeds=torch.ones(1, 3, 24))


def test_parts_that_do_not_fit():
    parts = pixel_parts()
    with pytest.raises(CheckpointError, match="takes 12 channels and gives 12, but pixels with .* have 3"):
        PixelPipeline(**parts | {"pixel_unshuffle": 1})
    with pytest.raises(CheckpointError, match="pixel_unshuffle is 0: it must be"):
        PixelPipeline(**parts | {"pixel_unshuffle": 0})
    with pytest.raises(CheckpointError, match="states of width 20, but the U-Net's cross-attention reads 28"):
        PixelPipeline(**pixel_parts(cross_attention_dim=28) | {"text_encoder": parts["text_encoder"]})
    with pytest.raises(CheckpointError, match="num_class_embeds=5, an input that PixelPipeline lacks"):
        PixelPipeline(**pixel_parts(num_class_embeds=5))
