"""Folders both ways: what stock saved opens here, and what is saved here opens in stock, bit for bit."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import BertConfig

from mmattn import UNet
from mmattn.errors import CheckpointError, ConfigError, UsageError
from tests.parity.unet_stock import CONFIGS, inputs, stock_unet
from tests.swap.zoo_sd import SD1, parts, vae

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def stock() -> UNet2DConditionModel:
    return stock_unet("sd1")


@pytest.fixture
def folder(stock: UNet2DConditionModel, tmp_path: Path) -> Path:
    stock.save_pretrained(tmp_path / "unet")
    return tmp_path / "unet"


def assert_same_weights(found: torch.nn.Module, expected: torch.nn.Module) -> None:
    ours, theirs = found.state_dict(), expected.state_dict()
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


@pytest.mark.parametrize("kind", CONFIGS)
def test_stock_to_ours_to_stock(kind: str, tmp_path: Path) -> None:
    stock = stock_unet(kind)
    stock.save_pretrained(tmp_path / "stock")
    ours = UNet.from_pretrained(tmp_path / "stock")
    assert not ours.training
    assert_same_weights(ours, stock)
    ours.save_pretrained(tmp_path / "ours")
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("stock", "ours")]
    for config in configs:
        config.pop("_name_or_path", None)
    assert configs[0] == configs[1]
    assert configs[1]["_class_name"] == "UNet2DConditionModel"
    again, info = UNet2DConditionModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values())
    assert_same_weights(again, stock)
    with torch.no_grad():
        given = inputs(kind)
        assert torch.equal(again(**given).sample, stock(**given).sample)


def test_a_saved_pipeline_names_stocks_class(stock: UNet2DConditionModel, tmp_path: Path) -> None:
    pipe = StableDiffusionPipeline(**parts(UNet.from_stock(stock)))
    pipe.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["unet"] == ["diffusers", "UNet2DConditionModel"]
    again = StableDiffusionPipeline.from_pretrained(tmp_path, tokenizer=None, safety_checker=None)
    assert type(again.unet) is UNet2DConditionModel
    assert_same_weights(again.unet, stock)
    assert_same_weights(UNet.from_pretrained(tmp_path), stock)  # finds unet/ by itself
    assert_same_weights(UNet.from_pretrained(tmp_path, subfolder="unet"), stock)
    with pytest.raises(CheckpointError, match="vae: this is AutoencoderKL, not UNet2DConditionModel"):
        UNet.from_pretrained(tmp_path, subfolder="vae")


@pytest.mark.parametrize(
    ("wanted", "found"), [(None, torch.float32), ("auto", torch.float16), (torch.bfloat16, torch.bfloat16)]
)
@pytest.mark.parametrize("options", [{}, {"max_shard_size": "4MB"}])
def test_dtypes_variants_and_shards(wanted: Any, found: torch.dtype, options: Any, tmp_path: Path) -> None:
    half = stock_unet("sd1").half()
    half.save_pretrained(tmp_path, variant="fp16", **options)
    ours = UNet.from_pretrained(tmp_path, variant="fp16", dtype=wanted)
    assert {parameter.dtype for parameter in ours.parameters()} == {found}
    assert_same_weights(ours, half.to(found))
    with pytest.raises(CheckpointError, match=f"no weights, looked for .*{WEIGHTS}"):
        UNet.from_pretrained(tmp_path)


def test_a_pickle_is_announced(stock: UNet2DConditionModel, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "diffusion_pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    with caplog.at_level(logging.WARNING, "mmattn"):
        assert_same_weights(UNet.from_pretrained(folder, dtype="auto"), stock)
    assert "is a pickle, not safetensors: reading it with torch.load(weights_only=True)" in caplog.text


class Evil:
    def __reduce__(self) -> Any:
        return (print, ("code ran",))


def test_a_pickle_with_code_is_refused(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    torch.save({"conv_in.weight": Evil()}, folder / "diffusion_pytorch_model.bin")
    with pytest.raises(CheckpointError, match="damaged or incomplete, or a pickle with more than tensors"):
        UNet.from_pretrained(folder)


def test_all_faults_of_the_weights_are_listed(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    del tensors["conv_in.weight"], tensors["mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"]
    tensors["conv_out.weight"] = torch.ones(3, 2)
    tensors["stray"] = torch.ones(1)
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(CheckpointError) as caught:
        UNet.from_pretrained(folder)
    message = str(caught.value)
    assert "2 missing: conv_in.weight, mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight" in message
    assert "1 not known: stray" in message
    assert "1 of another shape: conv_out.weight is [3, 2], not [4, 40, 3, 3]" in message


def test_damaged_files(folder: Path) -> None:
    weights = folder / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=f"{WEIGHTS}: not readable: damaged"):
        UNet.from_pretrained(folder)
    with pytest.raises(CheckpointError, match="no dtype to be read"):
        UNet.from_pretrained(folder, dtype="auto")
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json: damaged"):
        UNet.from_pretrained(folder)


def test_a_missing_shard(tmp_path: Path) -> None:
    stock_unet("sd1").save_pretrained(tmp_path, max_shard_size="4MB")
    sorted(tmp_path.glob("*.safetensors"))[1].unlink()
    with pytest.raises(CheckpointError, match=r"not readable: damaged or incomplete.*00002-of"):
        UNet.from_pretrained(tmp_path)


def test_folders_that_are_something_else(stock: UNet2DConditionModel, folder: Path, tmp_path: Path) -> None:
    vae().save_pretrained(tmp_path / "vae")
    BertConfig().save_pretrained(tmp_path / "bert")
    for name, found in (("vae", AutoencoderKL.__name__), ("bert", "bert")):
        with pytest.raises(CheckpointError, match=f"{name}: this is {found}, not UNet2DConditionModel"):
            UNet.from_pretrained(tmp_path / name)
    (tmp_path / "unet").rename(tmp_path / "net")
    with pytest.raises(CheckpointError, match=r"no config\.json.*subfolders with one: bert, net, vae"):
        UNet.from_pretrained(tmp_path)
    for place in (str(tmp_path / "none"), "./none", "a/b/c"):
        with pytest.raises(CheckpointError, match="no such folder"):
            UNet.from_pretrained(place)
    with pytest.raises(CheckpointError, match="someone/thing: neither a folder nor a U-Net on the hub"):
        UNet.from_pretrained("someone/thing", local_files_only=True)
    with pytest.raises(ConfigError, match="dtype 'float12' is unknown"):
        UNet.from_pretrained(tmp_path / "net", dtype="float12")


def test_adapters_are_not_saved_in_silence(tmp_path: Path) -> None:
    from peft import LoraConfig

    unet = UNet(**SD1)
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(UsageError, match=r"adapters are attached: save them with save_lora_adapter"):
        unet.save_pretrained(tmp_path)
