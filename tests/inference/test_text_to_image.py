"""`TextToImage` beside stock pipelines: the same pictures, whatever the batch; keys and values once; folders."""

from __future__ import annotations

import logging
from collections import Counter

import numpy as np
import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler, StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from PIL import Image
from safetensors.torch import load_file, save_file

import mmattn
from mmattn.inference.diffusion.context_once import context_projected_once
from mmattn.inference.diffusion.pixel_pipeline import PixelPipeline
from mmattn.inference.text_to_image import TextToImage
from mmattn.models.unet import UNet
from mmattn.models.unet.kv_file import cross_attention_kv_names, save_cross_attention_kv
from mmattn.nn import CrossAttention
from tests.swap.zoo_base import quiet

from .tiny_pipelines import pixel_parts, seeds, stable_diffusion, stable_diffusion_xl

PROMPTS = ["a red circle", "a blue square above a green star"]
STEPS = 3


@pytest.fixture(scope="module")
def stocks():
    return {
        "sd": stable_diffusion(),
        "xl": stable_diffusion_xl(),
        "pixels": quiet(PixelPipeline(**pixel_parts())),
    }


@pytest.fixture(scope="module")
def folders(stocks, tmp_path_factory):
    made = {}
    for name, pipe in stocks.items():
        made[name] = tmp_path_factory.mktemp(name)
        pipe.save_pretrained(made[name])
    return made


@pytest.fixture(scope="module")
def opened(folders):
    return {name: TextToImage.from_pretrained(folder, device="cpu") for name, folder in folders.items()}


def difference(first: list[Image.Image], second: list[Image.Image]) -> int:
    """Of the most different numbers of 0 to 255."""
    assert len(first) == len(second)
    pairs = zip(first, second, strict=True)
    return max(int(np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int)).max()) for a, b in pairs)


def draw(t2i: TextToImage, prompts=PROMPTS, **changes) -> list[Image.Image]:
    return t2i.generate(prompts, **{"num_inference_steps": STEPS} | changes)


def test_lazy_export():
    assert mmattn.TextToImage is TextToImage


@pytest.mark.parametrize("kind", ["sd", "xl", "pixels"])
def test_equals_the_stock_pipeline(stocks, opened, kind):
    stock, t2i = stocks[kind], opened[kind]
    assert isinstance(t2i.pipeline.unet, UNet)
    asked = {"num_inference_steps": STEPS, "guidance_scale": 5.0}
    expected = stock(PROMPTS, generator=seeds(0, 0), **asked).images
    assert difference(draw(t2i), expected) <= 1
    asked = {"num_inference_steps": STEPS, "guidance_scale": 3.0, "negative_prompt": ["nothing", "so"]}
    expected = stock(PROMPTS, generator=seeds(4, 5), **asked).images
    found = draw(t2i, negative_prompts=["nothing", "so"], guidance_scale=3.0, seed=[4, 5])
    assert difference(found, expected) <= 1
    expected = stock(PROMPTS[0], generator=seeds(4), num_inference_steps=STEPS, guidance_scale=1.0).images
    assert difference(draw(t2i, PROMPTS[0], guidance_scale=1, seed=4), expected) <= 1
    assert difference(found[:1], expected) > 8
    assert np.asarray(found[0]).std() > 5


@pytest.mark.parametrize("kind", ["sd", "xl", "pixels"])
@pytest.mark.parametrize("scheduler", [None, "euler-ancestral"])
def test_same_seed_same_picture_whatever_the_batch(folders, kind, scheduler):
    t2i = TextToImage.from_pretrained(folders[kind], device="cpu", scheduler=scheduler)
    together = draw(t2i, num_images_per_prompt=2, seed=11)
    assert len(together) == 4
    for size in (1, 3):
        assert difference(draw(t2i, num_images_per_prompt=2, seed=11, batch_size=size), together) <= 1
    assert difference(draw(t2i, PROMPTS[1], seed=12), together[3:]) <= 1
    assert difference(draw(t2i, PROMPTS, seed=[11, 12]), [together[0], together[3]]) <= 1
    assert difference(together[:1], together[1:2]) > 8
    state = torch.get_rng_state()
    draw(t2i, generator=seeds(11, 11))
    assert torch.equal(torch.get_rng_state(), state)
    assert isinstance(t2i.pipeline.scheduler, EulerAncestralDiscreteScheduler) == (scheduler is not None)


def counted(unet: UNet) -> tuple[Counter, list]:
    counts: Counter = Counter()
    layers = [layer for layer in unet.modules() if isinstance(layer, CrossAttention)]
    hooks = [layer.get_submodule("to_k").register_forward_hook(lambda *_: counts.update(["k"])) for layer in layers]
    return counts, [len(layers), hooks]


@pytest.mark.parametrize("kind", ["sd", "xl", "pixels"])
def test_keys_and_values_once_for_all_steps(opened, kind):
    t2i = opened[kind]
    counts, (num_layers, hooks) = counted(t2i.pipeline.unet)
    try:
        draw(t2i, num_inference_steps=4)
        assert counts["k"] == num_layers
        counts.clear()
        draw(t2i, num_inference_steps=4, batch_size=1)
        assert counts["k"] == 2 * num_layers
        assert not t2i.pipeline.unet._forward_pre_hooks
        if kind == "sd":  # outside, a stock pipeline works as ever
            counts.clear()
            t2i.pipeline(PROMPTS[0], num_inference_steps=4)
            assert counts["k"] == 4 * num_layers
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("kind", ["sd", "xl", "pixels"])
def test_encoded_prompts_are_held_by_the_caller(opened, kind):
    t2i = opened[kind]
    encoded = t2i.encode(PROMPTS, negative_prompts="nothing")
    assert len(encoded) == 2
    assert encoded.nbytes > 0
    calls = []
    hook = t2i.pipeline.text_encoder.register_forward_hook(lambda *_: calls.append(1))
    found = draw(t2i, encoded)
    hook.remove()
    assert not calls
    unguided = draw(t2i, t2i.encode(PROMPTS), guidance_scale=1)
    assert difference(found, draw(t2i, negative_prompts="nothing")) <= 1
    assert difference(unguided, draw(t2i, guidance_scale=1)) <= 1


def test_progress_batches_and_mode(opened, capsys):
    t2i = opened["sd"]
    t2i.pipeline.set_progress_bar_config(disable=True, desc="mine")
    t2i.pipeline.unet.train()
    t2i.pipeline.unet.requires_grad_(True)
    came: list[tuple[int, int]] = []
    pictures = draw(t2i, batch_size=1, progress=True, on_batch=lambda start, images: came.append((start, len(images))))
    assert t2i.pipeline.unet.training
    t2i.pipeline.unet.eval()
    assert came == [(0, 1), (1, 1)]
    assert "Drawing 2-2 of 2" in capsys.readouterr().err
    assert t2i.pipeline._progress_bar_config == {"disable": True, "desc": "mine"}
    draw(t2i, progress=False)
    assert capsys.readouterr().err == ""
    assert difference(pictures, draw(t2i)) <= 1


def test_sizes(opened):
    assert [t2i.size for t2i in opened.values()] == [(32, 32), (32, 32), (12, 8)]
    assert draw(opened["sd"], "a", height=40, width=64)[0].size == (64, 40)
    assert draw(opened["pixels"], "a", height=10, width=6)[0].size == (6, 10)


def test_round_trip(opened, folders, tmp_path):
    for kind, t2i in opened.items():
        t2i.save_pretrained(tmp_path / kind)
        again = TextToImage.from_pretrained(tmp_path / kind, device="cpu")
        assert difference(draw(again), draw(t2i)) == 0
    stock = quiet(StableDiffusionPipeline.from_pretrained(tmp_path / "sd"))
    expected = stock(PROMPTS, generator=seeds(0, 0), num_inference_steps=STEPS, guidance_scale=5.0).images
    assert difference(draw(opened["sd"]), expected) <= 1
    assert (tmp_path / "sd" / "model_index.json").read_text().count("mmattn") == 0


def test_half_precision(folders):
    t2i = TextToImage.from_pretrained(folders["sd"], device="cpu", dtype="bfloat16")
    assert t2i.dtype == torch.bfloat16
    assert t2i.pipeline.text_encoder.dtype == torch.bfloat16
    assert draw(t2i, "a")[0].size == (32, 32)


def stock_of(folders, kind: str):
    """The folder's pipeline with a stock U-Net."""
    if kind == "sd":
        return quiet(StableDiffusionPipeline.from_pretrained(folders[kind]))
    unet = UNet2DConditionModel.from_pretrained(folders[kind], subfolder="unet")
    return quiet(PixelPipeline.from_pretrained(folders[kind], unet=unet))


@pytest.fixture(scope="module")
def lora_files(folders, tmp_path_factory):
    made = {}
    for kind in ("sd", "pixels"):
        pipe = stock_of(folders, kind)
        targets = ["to_q", "to_k", "to_v", "to_out.0"]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            pipe.unet.add_adapter(LoraConfig(r=4, lora_alpha=16, init_lora_weights=False, target_modules=targets))
        made[kind] = tmp_path_factory.mktemp(f"lora-{kind}")
        pipe.save_lora_weights(made[kind], unet_lora_layers=get_peft_model_state_dict(pipe.unet))
    return made


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")  # of peft, at the second file
@pytest.mark.parametrize("kind", ["sd", "pixels"])
def test_lora_files(folders, lora_files, kind, tmp_path):
    t2i, lora_file = TextToImage.from_pretrained(folders[kind], device="cpu"), lora_files[kind]
    plain = draw(t2i)
    stock = stock_of(folders, kind)
    stock.load_lora_weights(lora_file, adapter_name="a")
    for scale in (1.0, 0.4):
        name = t2i.load_lora(lora_file, scale)
        assert name == lora_file.name.replace("-", "_")
        stock.set_adapters(["a"], [scale])
        asked = {"num_inference_steps": STEPS, "guidance_scale": 5.0}
        expected = stock(PROMPTS, generator=seeds(0, 0), **asked).images
        assert difference(draw(t2i), expected) <= 1
        assert difference(draw(t2i), plain) > 3
        with pytest.raises(mmattn.errors.UsageError, match="save_pretrained: the LoRA .* is loaded"):
            t2i.save_pretrained(tmp_path / "no")
        t2i.unload_lora()
    assert difference(draw(t2i), plain) == 0
    first, second = t2i.load_lora(lora_file / "pytorch_lora_weights.safetensors"), t2i.load_lora(lora_file, 0.5)
    assert first != second
    assert sorted(t2i.pipeline.get_active_adapters()) == sorted([first, second])


@pytest.mark.parametrize("kind", ["sd", "pixels"])
def test_a_lora_file_without_a_text_encoder_is_nothing_to_warn_of(folders, lora_files, kind, caplog):
    t2i = TextToImage.from_pretrained(folders[kind], device="cpu")
    state = torch.get_rng_state()
    t2i.load_lora(lora_files[kind])
    assert not caplog.records
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", ["sd", "xl"])
def test_lora_files_of_text_encoders(stocks, folders, kind, tmp_path):
    parts = {"sd": ["text_encoder"], "xl": ["unet", "text_encoder", "text_encoder_2"]}[kind]
    trained, stock = (quiet(type(stocks[kind]).from_pretrained(folders[kind])) for _ in range(2))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        for part in parts:
            targets = ["to_q", "to_v"] if part == "unet" else ["q_proj", "fc1"]
            lora = LoraConfig(r=3, init_lora_weights=False, target_modules=targets)
            inject_adapter_in_model(lora, getattr(trained, part))
    layers = {f"{part}_lora_layers": get_peft_model_state_dict(getattr(trained, part)) for part in parts}
    trained.save_lora_weights(tmp_path, **layers)
    stock.load_lora_weights(tmp_path, adapter_name="a")
    t2i = TextToImage.from_pretrained(folders[kind], device="cpu")
    plain = draw(t2i)
    name = t2i.load_lora(tmp_path, 0.7)
    assert t2i.pipeline.get_list_adapters() == {part: [name] for part in parts}
    stock.set_adapters(["a"], [0.7])
    expected = stock(PROMPTS, generator=seeds(0, 0), num_inference_steps=STEPS, guidance_scale=5.0).images
    assert difference(draw(t2i), expected) <= 1
    assert difference(draw(t2i), plain) > 3
    t2i.unload_lora()
    assert difference(draw(t2i), plain) == 0


def test_a_lora_file_with_other_weights_is_refused(folders, lora_files, tmp_path):
    held = load_file(lora_files["sd"] / "pytorch_lora_weights.safetensors")
    save_file(held | {"unet.conv_in.weight": torch.zeros(2)}, tmp_path / "more.safetensors")
    t2i = TextToImage.from_pretrained(folders["sd"], device="cpu")
    with pytest.raises(mmattn.errors.CheckpointError, match="it holds unet.conv_in.weight, which is no part of one"):
        t2i.load_lora(tmp_path)
    assert t2i.pipeline.get_list_adapters() == {}


def test_lora_file_of_another_model(folders, lora_files, tmp_path):
    lora_file = lora_files["sd"]
    other = TextToImage.from_pretrained(folders["pixels"], device="cpu")
    plain = draw(other)
    with pytest.raises(mmattn.errors.CheckpointError, match="LoRA file"):
        other.load_lora(lora_file)
    assert difference(draw(other), plain) == 0
    for place, message in (
        (tmp_path, "0 .safetensors files and none is pytorch_lora_weights"),
        (tmp_path / "a", "no such file or folder"),
        ("a.safetensors", "no such file or folder"),
    ):
        with pytest.raises(mmattn.errors.CheckpointError, match=message):
            other.load_lora(place)
    (tmp_path / "other.safetensors").write_bytes(b"nothing")
    with pytest.raises(mmattn.errors.CheckpointError, match="cannot be loaded as a LoRA file of this model"):
        other.load_lora(tmp_path)
    with pytest.raises(mmattn.errors.UsageError, match="scale is '1': it must be a number"):
        other.load_lora(lora_file, "1")


@pytest.mark.parametrize("kind", ["sd", "pixels"])
def test_cross_attention_kv_files(folders, kind, tmp_path):
    t2i = TextToImage.from_pretrained(folders[kind], device="cpu")
    plain = draw(t2i)
    trained = TextToImage.from_pretrained(folders[kind], device="cpu")
    unet = trained.pipeline.unet
    with torch.no_grad():
        for name in cross_attention_kv_names(unet):
            unet.get_parameter(name).mul_(-2)
    width = trained.pipeline.text_encoder.config.hidden_size
    save_cross_attention_kv(unet, tmp_path, tokens={"<new1>": torch.linspace(-1, 1, width)})
    assert t2i.load_cross_attention_kv(tmp_path) == ("<new1>",)
    assert difference(draw(t2i), draw(trained)) <= 1
    assert difference(draw(t2i), plain) > 3
    assert difference(draw(t2i, "a <new1>"), draw(t2i, "a")) > 0
    with pytest.raises(mmattn.errors.UsageError, match="its token <new1> is in the tokenizer already"):
        t2i.load_cross_attention_kv(tmp_path)
    save_cross_attention_kv(unet, tmp_path, tokens={"<new2>": torch.ones(width + 1)})
    with pytest.raises(mmattn.errors.CheckpointError, match="<new2> has an embedding of width"):
        t2i.load_cross_attention_kv(tmp_path)


def test_new_tokens_need_one_text_encoder(folders, tmp_path):
    t2i = TextToImage.from_pretrained(folders["xl"], device="cpu")
    unet = t2i.pipeline.unet
    save_cross_attention_kv(unet, tmp_path)
    assert t2i.load_cross_attention_kv(tmp_path) == ()
    save_cross_attention_kv(unet, tmp_path, tokens={"<new1>": torch.ones(48)})
    with pytest.raises(mmattn.errors.UsageError, match="has new tokens, <new1>, for one text encoder"):
        t2i.load_cross_attention_kv(tmp_path)


def test_a_context_is_kept_for_one_tensor_only(opened):
    pipe = opened["sd"].pipeline
    sample, text = torch.randn(2, 4, 4, 4), torch.randn(2, 11, 48)
    counts, (num_layers, hooks) = counted(pipe.unet)
    try:
        with context_projected_once(pipe.unet):
            with torch.no_grad():
                first = pipe.unet(sample, 3, encoder_hidden_states=text).sample
                assert torch.equal(pipe.unet(sample, 3, encoder_hidden_states=text).sample, first)
                assert counts["k"] == num_layers
                text.mul_(-1)
                changed = pipe.unet(sample, 3, encoder_hidden_states=text).sample
                assert counts["k"] == 2 * num_layers
                assert not torch.allclose(changed, first, atol=1e-3)
                pipe.unet(sample, 3, encoder_hidden_states=text.clone())
                assert counts["k"] == 3 * num_layers
            pipe.unet(sample, 3, encoder_hidden_states=text)  # with gradients
            assert counts["k"] == 4 * num_layers
    finally:
        for hook in hooks:
            hook.remove()


def test_a_long_prompt_is_said_once(opened, caplog):
    long = "a red circle above a blue square and so on it goes with many more words"
    for kind, limit in (("sd", 11), ("xl", 11), ("pixels", 13)):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            draw(opened[kind], [long, long, "a"], num_inference_steps=1)
        assert len(caplog.records) == 1
        said = caplog.records[0].getMessage()
        assert f"is longer than the {limit} tokens that the text encoder takes; it was cut: '" in said
        assert said.endswith("many more words'")
