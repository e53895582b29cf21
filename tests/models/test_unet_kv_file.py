"""Keys and values of cross-attention as a file: what is in it, who opens it, what it changes, what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from mmattn.data.tokenizer import train_tokenizer
from mmattn.errors import CheckpointError, UsageError
from mmattn.models.unet.kv_file import (
    WEIGHTS_FILE,
    cross_attention_kv_names,
    merge_cross_attention_kv,
    read_cross_attention_kv,
    save_cross_attention_kv,
)
from mmattn.training.selection import LoRAConfig, add_lora
from tests.swap.zoo_base import liven, quiet
from tests.swap.zoo_sd import FAMILIES, SD1, parts, unet_with

PIPELINES = ("sd1", "sd2", "sdxl", "upscale")
WORDS = "a red circle and a green square"


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def as_ours(unet: UNet2DConditionModel) -> nn.Module:
    from mmattn.models.unet import UNet

    return UNet.from_stock(unet)


KINDS = {"stock": lambda unet: unet, "ours": as_ours}


@torch.no_grad()
def change(unet: nn.Module) -> list[str]:
    """Add noise to the keys and values, and to nothing else."""
    names = cross_attention_kv_names(unet)
    generator = torch.Generator().manual_seed(5)
    for name in names:
        weight = unet.get_parameter(name)
        weight.add_(torch.randn(weight.shape, generator=generator), alpha=float(weight.std()))
    return names


@pytest.fixture(scope="module")
def unet() -> UNet2DConditionModel:
    return unet_with(SD1)


@pytest.fixture(scope="module")
def saved(unet, tmp_path_factory) -> Path:
    """The file of a U-Net like `unet`, with two new tokens."""
    folder = tmp_path_factory.mktemp("kv")
    save_cross_attention_kv(unet, folder, tokens={"<new1>": torch.randn(48), "<new2>": torch.randn(3, 48)})
    return folder


@pytest.mark.parametrize("family", PIPELINES)
def test_the_file_changes_a_stock_pipelines_picture_as_the_weights_do(family, tmp_path):
    build, run = FAMILIES[family].build, FAMILIES[family].run
    pipe, stock, merged = build(), build(), build()
    untouched = run(pipe)
    change(pipe.unet)
    file = save_cross_attention_kv(pipe.unet, tmp_path)
    wanted = run(pipe)
    assert (wanted - untouched).abs().max() > 0.1

    stock.unet.load_attn_procs(tmp_path, weight_name=WEIGHTS_FILE, _pipeline=stock)
    torch.testing.assert_close(run(stock), wanted, atol=1e-4, rtol=1e-4)  # diffusers' processors are eager ones

    merge_cross_attention_kv(merged.unet, file)
    assert torch.equal(run(merged), wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_the_names_are_the_layers_that_attend_to_the_text(kind):
    for family, counts in {"sd1": (20, 0), "sd2": (32, 0), "sdxl": (36, 0), "upscale": (20, 12)}.items():
        unet = FAMILIES[family].build().unet
        names = cross_attention_kv_names(KINDS[kind](unet))
        assert len(set(names)) == len(names)
        assert all(name.endswith((".to_k.weight", ".to_v.weight")) for name in names)
        text = unet.config.cross_attention_dim
        assert {unet.get_parameter(name).shape[1] for name in names} == {text}
        assert tuple(sum(f".{layer}." in name for name in names) for layer in ("attn2", "attn1")) == counts
        if family == "upscale":  # no layer of it is as wide as the text
            wide = [name for name, weight in unet.named_parameters() if weight.ndim == 2 and weight.shape[1] == text]
            assert set(names) == {name for name in wide if "attn" in name}


@pytest.mark.parametrize("kind", KINDS)
def test_only_keys_and_values_are_written_and_merged(kind, unet, tmp_path):
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    changed = KINDS[kind](unet_with(SD1))
    changed.load_state_dict(before)
    names = change(changed)
    save_cross_attention_kv(changed, tmp_path)
    size = sum(tensor.numel() for tensor in load_file(tmp_path / WEIGHTS_FILE).values())
    assert size == sum(before[name].numel() for name in names)

    target = KINDS[kind](unet_with(SD1))
    target.load_state_dict(before)
    merge_cross_attention_kv(target, tmp_path)
    after = target.state_dict()
    assert {name for name in before if not torch.equal(before[name], after[name])} == set(names)
    assert all(torch.equal(after[name], changed.state_dict()[name]) for name in names)


def test_a_merge_keeps_the_dtype_and_reaches_below_an_adapter(unet, saved):
    target = unet_with(SD1).to(torch.bfloat16)
    add_lora(target, LoRAConfig(targets=["to_k"]))
    merge_cross_attention_kv(target, saved)
    plain = cross_attention_kv_names(unet)
    for name, adapted in zip(plain, cross_attention_kv_names(target), strict=True):
        assert adapted == name.replace("to_k", "to_k.base_layer")
        assert torch.equal(target.get_parameter(adapted), unet.get_parameter(name).bfloat16())


def test_a_read_gives_weights_tokens_and_origin(unet, saved, tmp_path):
    kv = read_cross_attention_kv(saved)
    assert set(kv.weights) == set(cross_attention_kv_names(unet))
    assert {token: tuple(tensor.shape) for token, tensor in kv.tokens.items()} == {"<new1>": (48,), "<new2>": (3, 48)}
    assert kv.mmattn_version
    assert kv.base_model == ""
    unet_with(SD1).save_pretrained(tmp_path / "unet")
    opened = UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    save_cross_attention_kv(opened, tmp_path)
    assert read_cross_attention_kv(tmp_path).base_model == str(tmp_path / "unet")
    with safe_open(saved / WEIGHTS_FILE, framework="pt") as file:
        assert file.metadata()["format"] == "pt"


def test_a_file_that_diffusers_wrote_is_read_too(saved, tmp_path):
    pipe = FAMILIES["sd1_lora"].build()
    pipe.unload_lora_weights()
    pipe.unet.load_attn_procs(saved, weight_name=WEIGHTS_FILE, _pipeline=pipe)
    pipe.unet.save_attn_procs(tmp_path)
    ours, theirs = read_cross_attention_kv(saved).weights, read_cross_attention_kv(tmp_path).weights
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_new_tokens_open_in_a_stock_pipeline(saved):
    tokenizer = train_tokenizer([WORDS])
    tokenizer.model_max_length = 77
    pipe = quiet(StableDiffusionPipeline(**parts(unet_with(SD1)) | {"tokenizer": tokenizer}))
    options = {"num_inference_steps": 2, "output_type": "pt", "height": 64, "width": 64}
    plain = pipe("a red <new1>", generator=torch.manual_seed(0), **options).images
    tokens = read_cross_attention_kv(saved).tokens
    for token, embedding in tokens.items():
        pipe.load_textual_inversion(saved, token=token, weight_name=f"{token}.safetensors")
        first = tokenizer.convert_tokens_to_ids(token)
        table = pipe.text_encoder.get_input_embeddings().weight
        assert torch.equal(table[first : first + embedding.reshape(-1, 48).shape[0]], embedding.reshape(-1, 48))
    changed = pipe("a red <new1>", generator=torch.manual_seed(0), **options).images
    assert (changed - plain).abs().max() > 0.02


def refused(unet: nn.Module, folder: Path, message: str) -> None:
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        merge_cross_attention_kv(unet, folder)
    assert all(torch.equal(tensor, before[name]) for name, tensor in unet.state_dict().items())


def test_another_u_nets_file_is_refused_with_all_that_differs(unet, saved, tmp_path):
    tensors = load_file(saved / WEIGHTS_FILE)
    keys = [name for name in tensors if "to_k" in name]
    tensors.pop(keys[0])
    tensors["down_blocks.7.attn2.processor.to_v_custom_diffusion.weight"] = torch.ones(2, 3)
    tensors[keys[1]] = torch.ones(2, 3)
    save_file(tensors, tmp_path / WEIGHTS_FILE)
    refused(
        unet,
        tmp_path,
        r"keys and values of another U-Net: 1 missing: down_blocks\.0.*to_k\.weight; "
        r"1 not known: down_blocks\.7\.attn2\.to_v\.weight; 1 of another shape: .* is \[2, 3\], not \[80, 48\]",
    )


def test_files_that_hold_something_else_are_refused(unet, saved, tmp_path):
    refused(unet, tmp_path, f"{WEIGHTS_FILE}: no such file")
    (tmp_path / WEIGHTS_FILE).write_bytes(b"damaged")
    refused(unet, tmp_path, "damaged, not readable as safetensors")
    query = {"mid_block.attn2.processor.to_q_custom_diffusion.weight": torch.ones(2, 3)}
    save_file(load_file(saved / WEIGHTS_FILE) | query, tmp_path / WEIGHTS_FILE)
    refused(unet, tmp_path, "not a file of cross-attention keys and values only, it holds mid_block.*to_q")
    shutil.copy(saved / WEIGHTS_FILE, tmp_path)
    refused(unet, tmp_path, "<new1>.safetensors: no such file")
    save_file({"other": torch.ones(48)}, tmp_path / "<new1>.safetensors")
    refused(unet, tmp_path, "holds other, not the embedding of <new1>")


def test_models_that_have_no_such_layers_are_refused(tmp_path):
    with pytest.raises(UsageError, match="Linear has no cross-attention layers"):
        cross_attention_kv_names(nn.Linear(2, 3))
    blocks = {"down_block_types": ("SimpleCrossAttnDownBlock2D",), "up_block_types": ("SimpleCrossAttnUpBlock2D",)}
    config = {"mid_block_type": "UNetMidBlock2DSimpleCrossAttn", "block_out_channels": (16,), "norm_num_groups": 8}
    unet = UNet2DConditionModel(**blocks, **config, cross_attention_dim=12, attention_head_dim=4, layers_per_block=1)
    with pytest.raises(UsageError, match="added keys and values"):
        save_cross_attention_kv(unet, tmp_path)


def test_what_would_be_lost_or_misplaced_is_not_saved(tmp_path):
    unet = liven(unet_with(SD1))
    for token in ("", "two words", "../up"):
        with pytest.raises(UsageError, match="a new token is one word"):
            save_cross_attention_kv(unet, tmp_path, tokens={token: torch.ones(48)})
    with pytest.raises(UsageError, match=r"must be \[C\] or \[n, C\], not \[2, 3, 4\]"):
        save_cross_attention_kv(unet, tmp_path, tokens={"<new1>": torch.ones(2, 3, 4)})
    add_lora(unet, LoRAConfig(targets=["to_v"]))
    with pytest.raises(UsageError, match=r"attn2\.to_v holds an adapter: merge or remove it"):
        save_cross_attention_kv(unet, tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot be written"):
        save_cross_attention_kv(unet_with(SD1), tmp_path / "file")
    assert {path.name for path in tmp_path.iterdir()} == {"file"}
