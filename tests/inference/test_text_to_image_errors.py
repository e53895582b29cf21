"""What `TextToImage` refuses, and in which words."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverSDEScheduler, StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from mmattn.errors import CheckpointError, UsageError
from mmattn.inference.diffusion.pixel_pipeline import PixelPipeline
from mmattn.inference.diffusion.prompts import EncodedPrompts
from mmattn.inference.diffusion.schedulers import make_scheduler
from mmattn.inference.text_to_image import TextToImage
from mmattn.inference.trained import trained_model
from mmattn.models.unet import UNet
from tests.swap.zoo_base import quiet

from .tiny_pipelines import pixel_parts, seeds, stable_diffusion


@pytest.fixture(scope="module")
def t2i():
    parts = pixel_parts()
    return TextToImage(quiet(PixelPipeline(**parts | {"unet": UNet.from_stock(parts["unet"])})))


@pytest.fixture(scope="module")
def sd_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sd")
    stable_diffusion().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps is 0: it must be a whole number of 1 or more"),
        ({"num_inference_steps": 2.5}, "num_inference_steps is 2.5: it must be a whole number"),
        ({"num_inference_steps": 101}, "the model was trained with 100: take no more"),
        ({"guidance_scale": -1}, "guidance_scale is -1: it must be a number of 0 or more"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan"),
        ({"guidance_scale": "5"}, "guidance_scale is '5'"),
        ({"guidance_scale": 0.5}, "guidance_scale is 0.5, which would be ignored: guidance begins above 1"),
        ({"guidance_scale": 1, "negative_prompts": "no"}, "the negative prompts would be ignored: leave them out"),
        ({"negative_prompts": ["a", "b"]}, "2 negative_prompts for 1 prompts: give one, or one for each"),
        ({"negative_prompts": [3]}, "negative_prompts: number 1 of 1 is a int, not a str"),
        ({"height": 7}, "height is 7, but this model draws multiples of 2: take 6 or 8"),
        ({"width": 0}, "width is 0: it must be a whole number of 1 or more"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"seed": 1, "generator": seeds(1)}, "seed and generator are given together: leave one of them out"),
        ({"seed": [1, 2]}, "2 seeds for 1 prompts: give one, or one for each"),
        ({"seed": -1}, "seed is -1: it must be a whole number"),
        ({"generator": seeds(1, 2)}, "2 generators for 1 pictures: give one for each"),
        ({"generator": [1]}, "generator must be a torch.Generator, or a list of them"),
    ],
)
def test_arguments(t2i, changes, message):
    calls = []
    hook = t2i.pipeline.unet.register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(UsageError, match=message):
        t2i.generate("a red circle", **{"num_inference_steps": 2} | changes)
    hook.remove()
    assert not calls


def test_pndm_needs_its_first_steps(t2i):
    """Runge-Kutta, unless the scheduler skips it: then one step is enough."""
    kept = t2i.pipeline.scheduler
    try:
        t2i.pipeline.scheduler = pndm = make_scheduler("pndm", kept)
        message = r"num_inference_steps is 3, but PNDMScheduler begins with 4 Runge-Kutta steps .*: take 4 or more, or"
        with pytest.raises(UsageError, match=message):
            t2i.generate("a red circle", num_inference_steps=3)
        assert len(t2i.generate("a red circle", num_inference_steps=4)) == 1
        t2i.pipeline.scheduler = type(pndm).from_config(pndm.config, skip_prk_steps=True)
        assert len(t2i.generate("a red circle", num_inference_steps=1)) == 1
        t2i.pipeline.scheduler = make_scheduler("ddim", pndm)  # has PNDM's settings in its config, and needs no 4
        assert len(t2i.generate("a red circle", num_inference_steps=1)) == 1
    finally:
        t2i.pipeline.scheduler = kept


def test_prompts(t2i):
    for prompts, message in (
        ([], "no prompts were given: the list is empty"),
        (["a", None], "prompts: number 2 of 2 is a NoneType, not a str"),
        (["a", "b\udcff"], "prompts: number 2 of 2 holds half of a surrogate pair"),
        (b"a", "prompts is a bytes: give a str or a list of them"),
    ):
        with pytest.raises(UsageError, match=message):
            t2i.generate(prompts)
    encoded = t2i.encode("a")
    with pytest.raises(UsageError, match="negative_prompts belongs to encode"):
        t2i.generate(encoded, negative_prompts="b")
    other = EncodedPrompts(("a",), {"prompt_embeds": torch.ones(1, 3, 28)}, has_negative=False)
    with pytest.raises(UsageError, match="encoded by another model: width 28, but the U-Net reads 20"):
        t2i.generate(other)
    with pytest.raises(UsageError, match="without what guidance needs"):
        t2i.generate(EncodedPrompts(("a",), {"prompt_embeds": torch.ones(1, 3, 20)}, has_negative=False))


def test_a_distilled_unet_takes_its_guidance_as_an_input():
    t2i = TextToImage(stable_diffusion(time_cond_proj_dim=8))
    with pytest.raises(UsageError, match="negative prompts would be ignored: this U-Net was distilled"):
        t2i.generate("a", negative_prompts="b")
    with pytest.raises(UsageError, match="guidance_scale is 0: this U-Net was distilled with guidance as an input"):
        t2i.generate("a", guidance_scale=0)
    rows = []
    hook = t2i.pipeline.unet.register_forward_pre_hook(lambda module, given: rows.append(len(given[0])))
    first = t2i.generate("a", guidance_scale=2, num_inference_steps=1)[0]
    assert first.tobytes() != t2i.generate("a", guidance_scale=8, num_inference_steps=1)[0].tobytes()
    hook.remove()
    assert set(rows) == {1}


def test_folders_of_other_kinds(sd_folder, tmp_path):
    def index(**entries):
        (tmp_path / "model_index.json").write_text(json.dumps(entries))
        return tmp_path

    cases = [
        (tmp_path / "missing", "missing: neither a folder|no such folder"),
        (sd_folder / "unet", "a U-Net by itself, which mmattn.UNet.from_pretrained opens"),
        (sd_folder / "vae", "a single model of diffusers, AutoencoderKL"),
        (sd_folder / "text_encoder", "a model of transformers, CLIPTextModel, which draws no pictures"),
        (sd_folder / "tokenizer", "no model_index.json, so this is no diffusers pipeline"),
    ]
    for folder, message in cases:
        with pytest.raises(CheckpointError, match=message):
            TextToImage.from_pretrained(folder)
    flux = index(_class_name="FluxPipeline", transformer=["diffusers", "FluxTransformer2DModel"])
    with pytest.raises(CheckpointError, match="a FluxPipeline, whose model is no UNet2DConditionModel.*swap_attention"):
        TextToImage.from_pretrained(flux)
    inpaint = index(_class_name="StableDiffusionInpaintPipeline", unet=["diffusers", "UNet2DConditionModel"])
    with pytest.raises(CheckpointError, match="a StableDiffusionInpaintPipeline, not text to image"):
        TextToImage.from_pretrained(inpaint)
    with pytest.raises(UsageError, match="takes one of StableDiffusionPipeline, .*, not object"):
        TextToImage(object())


def test_damaged_folders(sd_folder, tmp_path):
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(sd_folder, broken)
    file = broken / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    lost = next(name for name in tensors if name.endswith("fc1.weight"))
    save_file({name: tensor for name, tensor in tensors.items() if name != lost}, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"text_encoder: weights are missing: .*fc1\.weight"):
        TextToImage.from_pretrained(broken, device="cpu")
    file.write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="text_encoder: cannot be opened"):
        TextToImage.from_pretrained(broken, device="cpu")
    (broken / "model_index.json").write_text("{")
    with pytest.raises(CheckpointError, match="damaged, not readable as JSON"):
        TextToImage.from_pretrained(broken)
    with pytest.raises(CheckpointError, match="fp16"):
        TextToImage.from_pretrained(sd_folder, device="cpu", variant="fp16")


def test_a_text_encoder_of_another_width():
    pipe = stable_diffusion(cross_attention_dim=56)
    with pytest.raises(CheckpointError, match="states of width 48, but the U-Net's cross-attention reads 56"):
        TextToImage(pipe)
    assert isinstance(pipe, StableDiffusionPipeline)


def test_an_inpainting_unet(tmp_path):
    stable_diffusion(in_channels=9).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="takes 9 channels and its autoencoder has 4: an inpainting or editing"):
        TextToImage.from_pretrained(tmp_path, device="cpu")


def test_schedulers_of_other_models(t2i):
    for name, reason in [
        ("FlowMatchEulerDiscreteScheduler", "is for another kind of model .it has no init_noise_sigma"),
        ("RePaintScheduler", "is for another kind of model .its steps need original_image, mask.: use ddim"),
        ("AmusedScheduler", "cannot take the settings of the model's own scheduler .AmusedScheduler"),
    ]:
        with pytest.raises(UsageError, match=f"{name} {reason}"):
            make_scheduler(name, t2i.pipeline.scheduler)


def test_schedulers(t2i, caplog):
    with pytest.raises(UsageError, match="scheduler 'dpm' is unknown: use ddim, ddpm, dpm"):
        make_scheduler("dpm", t2i.pipeline.scheduler)
    clipped = DDIMScheduler(clip_sample=True, prediction_type="v_prediction")
    with caplog.at_level(logging.WARNING):
        euler = make_scheduler("euler", clipped)
    assert caplog.messages == [
        "EulerDiscreteScheduler has no clip_sample=True, which the model's own scheduler sets: it is left out"
    ]
    assert euler.config.prediction_type == "v_prediction"
    assert make_scheduler(clipped, t2i.pipeline.scheduler) is clipped
    kept = t2i.pipeline.scheduler
    t2i.pipeline.scheduler = DPMSolverSDEScheduler.__new__(DPMSolverSDEScheduler)
    try:
        with pytest.raises(UsageError, match="DPMSolverSDEScheduler draws noise that the seed does not decide"):
            t2i.generate("a")
    finally:
        t2i.pipeline.scheduler = kept


def test_a_training_runs_folder(tmp_path):
    with pytest.raises(CheckpointError, match="neither config.json nor model_index.json nor best/ nor final/"):
        trained_model(tmp_path)
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "model_index.json").write_text("{}")
    assert trained_model(tmp_path) == tmp_path / "final"
