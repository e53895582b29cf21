"""The diffusion U-Net on a card: as stock in float32 and in half types, pictures, and a short training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel

from mmattn.config import load_config, load_recipe
from mmattn.inference.text_to_image import TextToImage
from mmattn.models.unet import UNet, pictures
from tests.gpu.card import DEVICE, HALF_TYPES, MARKS
from tests.inference.tiny_pipelines import stable_diffusion

pytestmark = MARKS
PROMPTS = ["a red circle", "a green star and so on"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("sd")
    stable_diffusion().save_pretrained(path)
    return path


def _inputs(unet: UNet2DConditionModel, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draws = torch.Generator().manual_seed(0)
    sample = torch.randn(3, 4, 16, 24, generator=draws)
    text = torch.randn(3, 11, unet.config["cross_attention_dim"], generator=draws)
    return sample.to(DEVICE, dtype), torch.tensor([3, 400, 977], device=DEVICE), text.to(DEVICE, dtype)


@pytest.fixture
def exact():
    """Products and convolutions in float32, not TF32."""
    matmul, cudnn = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, cudnn


def test_predictions_and_gradients_equal_stock(folder, exact):
    stock = UNet2DConditionModel.from_pretrained(folder, subfolder="unet").to(DEVICE)
    ours = UNet.from_pretrained(folder, subfolder="unet", device=DEVICE)
    inputs = _inputs(stock, torch.float32)
    outputs = [unet(*inputs).sample for unet in (ours, stock)]
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)
    for output in outputs:
        output.square().mean().backward()
    wanted = dict(stock.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name].grad, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("dtype", HALF_TYPES, ids=str)
def test_half_types_are_as_close_to_float32_as_stock(folder, dtype, exact):
    reference = UNet2DConditionModel.from_pretrained(folder, subfolder="unet").to(DEVICE)
    stock = UNet2DConditionModel.from_pretrained(folder, subfolder="unet", torch_dtype=dtype).to(DEVICE)
    ours = UNet.from_pretrained(folder, subfolder="unet", dtype=dtype, device=DEVICE)
    with torch.no_grad():
        wanted = reference(*_inputs(reference, torch.float32)).sample
        errors = [(unet(*_inputs(unet, dtype)).sample.float() - wanted).abs().max() for unet in (ours, stock)]
        sample, timestep, text = _inputs(ours, dtype)
        projected = ours(sample, timestep, ours.project_context(text)).sample.float()
    assert errors[0] <= 2 * errors[1] + 1e-3
    assert (projected - wanted).abs().max() <= 2 * errors[1] + 1e-3


@pytest.mark.parametrize("dtype", HALF_TYPES, ids=str)
def test_training_in_half_types_is_as_close_to_float32_as_stock(folder, dtype, exact, monkeypatch):
    own, calls = pictures._normed, []
    monkeypatch.setattr(pictures, "_normed", lambda *given, **options: calls.append(1) or own(*given, **options))
    stock = UNet2DConditionModel.from_pretrained(folder, subfolder="unet").to(DEVICE)
    ours = UNet.from_pretrained(folder, subfolder="unet", device=DEVICE)
    inputs = _inputs(stock, torch.float32)

    def trained(unet, autocast):
        unet.zero_grad()
        with torch.autocast(DEVICE, dtype, enabled=autocast):
            out = unet(*inputs).sample
        (512 * out.float().square().mean()).backward()  # float16's gradients would vanish
        return {"output": out.detach()} | {name: parameter.grad for name, parameter in unet.named_parameters()}

    wanted, theirs, found = trained(stock, False), trained(stock, True), trained(ours, True)
    assert bool(calls) == (DEVICE == "cuda")
    for name, got in found.items():
        exact = wanted[name].double()
        errors = [(each.double() - exact).norm() / exact.norm() for each in (got, theirs[name])]
        assert errors[0] <= 2 * errors[1] + 1e-3, name


def test_pictures_equal_stock_and_do_not_depend_on_the_batch(folder, exact):
    ours = TextToImage.from_pretrained(folder, device=DEVICE, dtype=torch.float32)
    both = ours.generate(PROMPTS, num_inference_steps=3, seed=[0, 1], progress=False)
    alone = ours.generate(PROMPTS[1], num_inference_steps=3, seed=1, progress=False)[0]
    assert np.abs(np.asarray(both[1], dtype=int) - np.asarray(alone, dtype=int)).max() <= 1
    stock = StableDiffusionPipeline.from_pretrained(folder).to(DEVICE)
    stock.set_progress_bar_config(disable=True)
    generator = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    wanted = stock(PROMPTS, num_inference_steps=3, guidance_scale=5.0, generator=generator).images
    for found, expected in zip(both, wanted, strict=True):
        assert np.abs(np.asarray(found, dtype=int) - np.asarray(expected, dtype=int)).max() <= 1


def test_the_recipe_trains(tmp_path):
    recipe = load_recipe("diffusion")
    settings = [f"training.output_dir={tmp_path / 'run'}", "training.max_steps=4", "training.eval_every=4"]
    few = ["evaluation.limit=3", "evaluation.num_inference_steps=2", "evaluation.sample_columns=1"]
    device = ["training.device=auto" if DEVICE == "cuda" else "training.device=cpu"]
    result = recipe.train(load_config(recipe.Config, "diffusion/debug", [*settings, *few, *device]))
    assert np.isfinite(result.losses).all()
    assert np.isfinite(result.metrics["validation/loss"])
