"""LoRA between pipelines with stock's U-Net and with ours: the same files, the same pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig, get_peft_model_state_dict
from torch import Tensor

from mmattn import UNet
from mmattn.errors import UsageError
from mmattn.models.unet import UNetContext
from tests.swap.zoo_base import Draw, quiet, seeded
from tests.swap.zoo_sd import SD1, parts, run_pipeline, unet_with

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "conv1"]


@seeded
def stock_pipe() -> StableDiffusionPipeline:
    return quiet(StableDiffusionPipeline(**parts(unet_with(SD1))))


def our_pipe() -> StableDiffusionPipeline:
    pipe = stock_pipe()
    pipe.register_modules(unet=UNet.from_stock(pipe.unet))
    return pipe


def train_adapter(pipe: Any, folder: Path, seed: int) -> None:
    """A LoRA file of random weights that are not zero, made with a pipeline's U-Net, which it leaves behind."""
    torch.manual_seed(seed)
    pipe.unet.add_adapter(LoraConfig(r=3, lora_alpha=6, init_lora_weights=False, target_modules=TARGETS))
    with torch.no_grad():
        for name, parameter in pipe.unet.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.05)
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=get_peft_model_state_dict(pipe.unet))
    pipe.unload_lora_weights()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One adapter saved from stock, one from ours."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("stock", "ours")}
    train_adapter(stock_pipe(), folders["stock"], 1)
    train_adapter(our_pipe(), folders["ours"], 2)
    return folders


@pytest.fixture(scope="module")
def plain() -> Tensor:
    return run_pipeline(stock_pipe())


@pytest.mark.parametrize("maker", ["stock", "ours"])
def test_a_file_opens_in_both(maker: str, files: dict[str, Path], plain: Tensor) -> None:
    pictures = []
    for pipe in (stock_pipe(), our_pipe()):
        pipe.load_lora_weights(files[maker])
        full = run_pipeline(pipe)
        half = run_pipeline(pipe, cross_attention_kwargs={"scale": 0.5})
        none = run_pipeline(pipe, cross_attention_kwargs={"scale": 0.0})
        pictures.append((full, half, none))
    for stock, ours in zip(*pictures, strict=True):
        torch.testing.assert_close(ours, stock)
    full, half, none = pictures[1]
    torch.testing.assert_close(none, plain)
    assert (full - plain).abs().max() > 0.1
    assert (full - half).abs().max() > 0.1
    assert (half - plain).abs().max() > 0.1


def test_the_life_of_two_adapters(files: dict[str, Path], plain: Tensor) -> None:
    found: dict[str, list[Tensor]] = {}
    for pipe in (stock_pipe(), our_pipe()):
        for name, folder in files.items():
            pipe.load_lora_weights(folder, adapter_name=name)
        pipe.set_adapters(["stock", "ours"], adapter_weights=[0.7, {"unet": {"down": 0.3, "mid": 0.9, "up": 0.5}}])
        found.setdefault("both", []).append(run_pipeline(pipe))
        pipe.set_adapters("ours")
        found.setdefault("one", []).append(run_pipeline(pipe))
        pipe.disable_lora()
        found.setdefault("disabled", []).append(run_pipeline(pipe))
        pipe.enable_lora()
        pipe.fuse_lora(lora_scale=0.8)
        found.setdefault("fused", []).append(run_pipeline(pipe))
        pipe.unfuse_lora()
        found.setdefault("unfused", []).append(run_pipeline(pipe))
        pipe.unload_lora_weights()
        found.setdefault("unloaded", []).append(run_pipeline(pipe))
        assert not [name for name, _ in pipe.unet.named_parameters() if "lora" in name]
    for stock, ours in found.values():
        torch.testing.assert_close(ours, stock)
    for name in ("disabled", "unloaded"):
        torch.testing.assert_close(found[name][1], plain)
    for name in ("both", "one", "fused"):
        assert (found[name][1] - plain).abs().max() > 0.1, name


def test_a_context_made_inside_the_forward_holds_the_scale(files: dict[str, Path]) -> None:
    unet = our_pipe().unet
    unet.load_lora_adapter(files["stock"], prefix="unet", weight_name="pytorch_lora_weights.safetensors")
    draw = Draw(unet)
    given: dict[str, Any] = {"sample": draw.normal(2, 4, 8, 6), "timestep": 300}
    text = draw.normal(2, 7, SD1["cross_attention_dim"])
    with torch.no_grad():
        for scale in (0.25, 1.0):
            given["cross_attention_kwargs"] = {"scale": scale}
            expected = unet(**given, encoder_hidden_states=text).sample
            context = UNetContext(text)
            for _ in range(2):
                assert torch.equal(unet(**given, encoder_hidden_states=context).sample, expected)


def test_fusing_projections_is_refused_under_an_adapter(files: dict[str, Path]) -> None:
    pipe = our_pipe()
    pipe.load_lora_weights(files["stock"])
    with pytest.raises(UsageError, match=r"fuse: .*attn1: to_q is a peft\..*not a plain torch Linear"):
        pipe.unet.fuse_qkv_projections()
