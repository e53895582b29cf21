"""`mmattn swap`: what it prints, proves and refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import mmattn.cli.stock_models
from mmattn.cli.main import main
from mmattn.cli.stock_models import Outline, open_model, outline_model
from mmattn.swap.diffusers.layer import Swapped
from tests.swap.zoo import FAMILIES


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline, a model of diffusers and one of transformers, as their libraries save them."""
    place = tmp_path_factory.mktemp("models")
    for name in ("sd1_controlnet", "pixart", "marian", "cogvideox"):
        FAMILIES[name].build().save_pretrained(place / name)
    return place


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(mmattn.cli.stock_models, "open_model", refuse)


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        (
            "sd1_controlnet",
            [
                "StableDiffusionControlNetPipeline: 30 of 30 attention layers swapped, 0 refused",
                "  unet: 10 cross, was AttnProcessor2_0, now auto",
                "  controlnet: 4 self, was AttnProcessor2_0, now auto",
                "  vae.decoder.mid_block.attentions.0 [self]: was AttnProcessor2_0, now auto; keeps group_norm",
            ],
        ),
        ("pixart", ["PixArtTransformer2DModel: 6 of 6 attention layers swapped, 0 refused"]),
        ("marian", ["MarianMTModel: 6 of 6 attention layers swapped, 0 refused", "was MarianAttention (sdpa), now"]),
    ],
)
def test_dry_run_needs_no_weights(folders: Path, tmp_path: Path, capsys, no_weights: None, name: str, lines: list[str]):
    def is_weights(_: str, names: list[str]) -> list[str]:
        return [name for name in names if name.endswith(".safetensors")]

    copy = shutil.copytree(folders / name, tmp_path / name, ignore=is_weights)
    assert main(["swap", str(copy), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("dry run, nothing is swapped; a swap would do this:\n")
    for line in lines:
        assert line in printed


def test_an_outline_has_no_weights_and_is_not_swapped(folders: Path):
    outline = outline_model(str(folders / "sd1_controlnet"))
    assert isinstance(outline, Outline)
    assert type(outline).__name__ == "StableDiffusionControlNetPipeline"
    assert sorted(outline.components) == ["controlnet", "text_encoder", "unet", "vae"]
    assert all(weight.is_meta for model in outline.components.values() for weight in model.parameters())
    assert not any(isinstance(each, Swapped) for each in outline.components["unet"].attn_processors.values())


def test_only_the_parts_concerned_are_read(folders: Path):
    opened = open_model(str(folders / "sd1_controlnet"), {"vae"})
    assert list(opened.components) == ["vae"]
    assert not opened.components["vae"].training
    assert not any(weight.is_meta for weight in opened.components["vae"].parameters())


@pytest.mark.parametrize("name", ["pixart", "marian"])
def test_verify(folders: Path, capsys, name: str):
    assert main(["swap", str(folders / name), "--verify"]) == 0
    printed = capsys.readouterr().out
    assert "6 of 6 attention layers swapped, 0 refused" in printed
    assert "whole model: to stock" in printed
    assert printed.endswith("same output\n")


def test_a_training_run_is_swapped_by_its_result(folders: Path, tmp_path: Path, capsys):
    shutil.copytree(folders / "marian", tmp_path / "run" / "final")
    assert main(["swap", str(tmp_path / "run"), "--verify"]) == 0
    assert "6 of 6 attention layers swapped, 0 refused" in capsys.readouterr().out


def test_parts_roles_and_backend(folders: Path, capsys):
    folder = str(folders / "sd1_controlnet")
    options = ["--part", "unet", "--part", "text_encoder", "--role", "cross", "--backend", "sdpa"]
    assert main(["swap", folder, *options, "--verify"]) == 0
    printed = capsys.readouterr().out
    assert "StableDiffusionControlNetPipeline: 10 of 10 attention layers swapped, 0 refused" in printed
    assert "  unet: 10 cross, was AttnProcessor2_0, now sdpa\n" in printed
    assert "[self]: AttnProcessor2_0, not asked for" in printed


def test_another_output_is_exit_code_1(folders: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    import mmattn.swap.diffusers.processors as processors

    leave = processors.leave
    monkeypatch.setattr(processors, "leave", lambda *arguments: 1.01 * leave(*arguments))
    assert main(["swap", str(folders / "pixart"), "--verify"]) == 1
    printed = capsys.readouterr()
    assert printed.out.endswith("NOT the same output\n")
    assert printed.err.endswith(f"mmattn: {folders / 'pixart'}: the output is not the same\n")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("pixart", ["--backend", "flash9"], "unknown attention backend 'flash9'; use one of: auto, "),
        (
            "sd1_controlnet",
            ["--part", "unett"],
            "no part unett in StableDiffusionControlNetPipeline; it has controlnet",
        ),
        ("sd1_controlnet", ["--part", "vae", "--role", "cross"], "has no cross attention in these parts"),
        (
            "cogvideox",
            [],
            "2 of 2 layers must be left alone: model.transformer_blocks.0.attn1: CogVideoXAttnProcessor2",
        ),
        ("marian", ["--dry-run", "--verify"], "--verify compares a swapped model: leave out --dry-run"),
    ],
)
def test_wrong_usage_is_found_before_weights_are_read(
    folders: Path, capsys, no_weights: None, name: str, options: list[str], message: str
):
    assert main(["swap", str(folders / name), *options]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("mmattn: ")
    assert message in printed.err
    assert printed.err.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no model here: neither config.json nor model_index.json nor best/ nor final/"),
        ({}, "its config.json names no class (_class_name, architectures or model_type)"),
        (
            {"model_type": "mmattn_vlm", "architectures": ["CaptioningNetwork"]},
            "a network of mmattn's own, whose attention is mmattn's already: nothing to swap",
        ),
        ({"_class_name": "UNet9D"}, "has no class UNet9D"),
        ({"architectures": ["NobodyModel"]}, "has no class NobodyModel"),
        ({"model_type": "nobody"}, "cannot be opened: "),
        ("[", "config.json: damaged, not readable as JSON"),
        ([], "config.json: a JSON object was expected, not list"),
        ({"_class_name": "ControlNetModel", "norm_num_groups": 7}, "cannot be opened: "),
    ],
)
def test_a_folder_that_is_no_model(tmp_path: Path, capsys, content: object, message: str):
    if content is not None:
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / "config.json").write_text(text)
    assert main(["swap", str(tmp_path)]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"mmattn: {tmp_path}")
    assert message in last


@pytest.mark.parametrize("name", ["./nowhere", "/no/where", "nobody/nothing"])
def test_a_name_that_is_nowhere(name: str, capsys):
    assert main(["swap", name, "--dry-run"]) == 2
    printed = capsys.readouterr()
    assert (printed.out, printed.err.count("\n")) == ("", 1)
    assert f"mmattn: {name}: no such folder" in printed.err


def test_damaged_weights(folders: Path, tmp_path: Path, capsys):
    copy = shutil.copytree(folders / "pixart", tmp_path / "pixart")
    weights = copy / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert main(["swap", str(copy)]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"mmattn: {copy}: cannot be opened: ")
    weights.unlink()
    assert main(["swap", str(copy)]) == 2
    assert "cannot be opened: " in capsys.readouterr().err.splitlines()[-1]


def test_a_constructor_that_computes_is_opened_with_its_weights(folders: Path, monkeypatch: pytest.MonkeyPatch):
    def compute(*_: object) -> None:
        raise RuntimeError("Tensor.item() cannot be called on meta tensors")

    monkeypatch.setattr(mmattn.cli.stock_models, "_from_config", compute)
    model = outline_model(str(folders / "pixart"))
    assert isinstance(model, torch.nn.Module)
    assert not any(weight.is_meta for weight in model.parameters())
