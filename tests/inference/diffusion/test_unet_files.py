"""LoRA of a U-Net as a file: stock pipelines load it and paint what the trained model paints."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mmattn.errors import CheckpointError, UsageError
from mmattn.inference.diffusion.unet_files import LORA_FILE, save_unet_lora
from mmattn.training.selection import LoRAConfig, add_lora
from tests.swap.zoo_sd import FAMILIES, SD1, text_encoder, unet_with

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
TARGETS = {
    "attention": ATTENTION,
    "more layers": [*ATTENTION, "proj_in", "ff.net.0.proj", "conv1"],
    "a pattern": [r".*attn2\.to_[kv]"],
}


@torch.no_grad()
def adapt(module: nn.Module, targets: list[str], seed: int = 3) -> nn.Module:
    """Adapters whose alpha is not their rank, with values that count."""
    add_lora(module, LoRAConfig(rank=3, alpha=5, targets=targets))
    generator = torch.Generator().manual_seed(seed)
    for name, weight in module.named_parameters():
        if ".lora_" in name:
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.5 * weight[0].numel() ** -0.5)
    return module.eval()


def as_ours(pipe):
    from mmattn.models.unet import UNet

    pipe.unet = UNet.from_stock(pipe.unet)
    return pipe


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("family", ["sd1_controlnet", "sdxl"])
def test_a_stock_pipeline_paints_with_the_file_as_the_trained_model(family, targets, tmp_path):
    build, run = FAMILIES[family].build, FAMILIES[family].run
    pipe, stock = build(), build()
    untouched = run(pipe)
    adapt(pipe.unet, TARGETS[targets])
    wanted = run(pipe)
    assert (wanted - untouched).abs().max() > 0.02
    assert save_unet_lora(pipe.unet, tmp_path) == tmp_path / LORA_FILE
    stock.load_lora_weights(tmp_path)
    torch.testing.assert_close(run(stock), wanted, atol=1e-4, rtol=1e-4)
    assert [path.name for path in tmp_path.iterdir()] == [LORA_FILE]


def test_adapters_of_our_u_net_open_in_a_stock_pipeline(tmp_path):
    build, run = FAMILIES["sdxl"].build, FAMILIES["sdxl"].run
    pipe, stock = as_ours(build()), build()
    adapt(pipe.unet, ATTENTION)
    save_unet_lora(pipe.unet, tmp_path)
    stock.load_lora_weights(tmp_path)
    torch.testing.assert_close(run(stock), run(pipe), atol=1e-4, rtol=1e-4)


def test_the_text_encoders_adapters_go_into_the_same_file(tmp_path):
    build, run = FAMILIES["sd1_controlnet"].build, FAMILIES["sd1_controlnet"].run
    pipe, stock = build(), build()
    adapt(pipe.unet, ATTENTION)
    without = run(pipe)
    adapt(pipe.text_encoder, ["q_proj", "v_proj", "fc1"], seed=4)
    wanted = run(pipe)
    assert (wanted - without).abs().max() > 0.02
    save_unet_lora(pipe.unet, tmp_path, text_encoder=pipe.text_encoder)
    stock.load_lora_weights(tmp_path)
    torch.testing.assert_close(run(stock), wanted, atol=1e-4, rtol=1e-4)


def test_nothing_to_save_and_a_disk_that_refuses(tmp_path):
    unet = unet_with(SD1)
    with pytest.raises(UsageError, match="no LoRA to save: neither the U-Net nor a text encoder has adapters"):
        save_unet_lora(unet, tmp_path, text_encoder())
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="file.*cannot be written"):
        save_unet_lora(adapt(unet, ["to_q"]), tmp_path / "file")
