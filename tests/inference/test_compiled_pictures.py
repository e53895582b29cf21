"""Compiled denoising steps: the pictures of the ordinary path, and no second compilation."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch._dynamo.testing import CompileCounterWithBackend

import mmattn
from mmattn.errors import RunError, UsageError
from mmattn.inference.diffusion.pixel_pipeline import PixelPipeline
from mmattn.inference.text_to_image import TextToImage
from mmattn.models.unet import CompiledUNet, UNet, UNetContext
from mmattn.nn import CrossAttention
from mmattn.ops import limits, registry
from mmattn.ops.backends import eager
from mmattn.ops.limits import AutoShape
from mmattn.ops.registry import use_backend
from tests.inference.tiny_pipelines import pixel_parts, stable_diffusion, stable_diffusion_xl
from tests.swap.zoo_base import quiet

PROMPTS = ["a red circle", "a blue square above a green star", "nothing"]
STEPS = 3


@pytest.fixture(autouse=True)
def no_recompilation():
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    pipes = {"sd": stable_diffusion(), "xl": stable_diffusion_xl(), "pixels": quiet(PixelPipeline(**pixel_parts()))}
    found = {}
    for name, pipe in pipes.items():
        found[name] = tmp_path_factory.mktemp(name)
        pipe.save_pretrained(found[name])
    return found


class Pair:
    """A pipeline in both ways, with what was compiled."""

    def __init__(self, folder: Any, *, backend: str = "eager", device: str = "cpu") -> None:
        self.eager, self.ours = (TextToImage.from_pretrained(folder, device=device, dtype="float32") for _ in range(2))
        self.counter = CompileCounterWithBackend(backend)
        self.ours.compile(backend=self.counter)  # type: ignore[arg-type]

    @property
    def num_compiled(self) -> int:
        return self.counter.frame_count

    def check(self, prompts: Any = PROMPTS, **changes: Any) -> list[Image.Image]:
        """Pictures must be equal to rounding; returns ours."""
        asked = {"num_inference_steps": STEPS, "progress": False} | changes
        expected, found = (model.generate(prompts, **asked) for model in (self.eager, self.ours))
        assert difference(expected, found) <= 1
        return found


def difference(first: list[Image.Image], second: list[Image.Image]) -> int:
    """Of the most different numbers of 0 to 255."""
    pairs = zip(first, second, strict=True)
    return max(int(np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int)).max()) for a, b in pairs)


@pytest.fixture(scope="module")
def pairs(folders) -> dict[str, Pair]:
    return {name: Pair(folder) for name, folder in folders.items()}


@pytest.mark.parametrize("kind", ["sd", "xl", "pixels"])
def test_pictures_over_steps_prompts_sizes_and_numbers(pairs, kind):
    pair = pairs[kind]
    first = pair.check()
    assert difference(first[:1], first[1:2]) > 1
    before = pair.num_compiled
    pair.check(num_inference_steps=STEPS + 2, seed=5)
    pair.check(PROMPTS[:2], num_images_per_prompt=2, guidance_scale=3.0)
    pair.check(PROMPTS[1::-1], guidance_scale=1.0)
    assert pair.num_compiled == before
    height, width = pair.ours.size
    pair.check(PROMPTS[:2], height=3 * height, width=2 * width)
    middle = pair.num_compiled
    pair.check(PROMPTS[1], height=2 * height, width=3 * width)
    assert pair.num_compiled == middle
    pair.check(PROMPTS[0], guidance_scale=1.0)
    single = pair.num_compiled
    pair.check(PROMPTS[1], guidance_scale=1.0, num_inference_steps=2)
    assert pair.num_compiled == single


@pytest.fixture
def measured(monkeypatch):
    """As on a card: a backend that "auto" takes for 16 queries of heads of 8 to a text, and for no other call."""
    text = AutoShape(((9, 0),), (torch.float32,), (8,), keys=(11, 11), queries=(16,), heads=(1, 99))
    row = dataclasses.replace(eager.BACKEND, name="measured", auto_devices=("cpu",), auto_shapes=(text,))
    monkeypatch.setattr(limits, "_capability_of", lambda device: (9, 0))
    monkeypatch.setattr(registry, "TABLE", (row, *registry.TABLE))
    monkeypatch.setattr(registry, "_CHOICES", {})


@pytest.mark.usefixtures("measured")
def test_numbers_of_places_that_have_a_compilation_of_their_own(folders):
    """Those for which "auto" has measurements, in heads of their size: no number is compiled twice."""
    pair = Pair(folders["sd"])
    height, width = pair.ours.size
    kinds = pair.ours.compiled._compiled

    def fixed():
        return {(kind.widths[2], kind.places) for kind in kinds if kind.are_places_fixed and kind.places > 1}

    pair.check()
    before = pair.num_compiled
    assert fixed() == {(8, 16)}
    pair.check(num_inference_steps=2, seed=5)
    assert pair.num_compiled == before == len(kinds)
    pair.check(PROMPTS[:2], height=3 * height, width=3 * width)
    assert pair.num_compiled == before + 2 == len(kinds)  # other places in heads of 8, and more than one in those of 16
    pair.check(PROMPTS[:2], height=2 * height, width=2 * width)  # 16 places in heads of 12
    assert pair.num_compiled == len(kinds)
    assert fixed() == {(8, 16)}


@torch.no_grad()
@pytest.mark.usefixtures("measured")
def test_such_numbers_with_several_pictures_of_a_text():
    """As many queries of self-attention, and times as many of a text."""
    unet = UNet.from_stock(stable_diffusion().unet)
    counter = CompileCounterWithBackend("eager")
    steps = CompiledUNet(unet, backend=counter)
    context = UNetContext(torch.randn(2, 11, unet.config.cross_attention_dim))
    for side in (6, 4):
        sample = torch.randn(6, 4, side, side)
        expected = unet(sample, 7, context).sample
        with steps.installed():
            torch.testing.assert_close(unet(sample, 7, context).sample, expected)
    assert counter.frame_count == len(steps._compiled)


def test_encoded_prompts_and_schedulers(folders):
    pair = Pair(folders["sd"])
    for model in (pair.eager, pair.ours):
        model.pipeline.scheduler = type(model.pipeline.scheduler).from_config(model.pipeline.scheduler.config)
    encoded = [model.encode(PROMPTS[:2]) for model in (pair.eager, pair.ours)]
    asked = {"num_inference_steps": STEPS, "progress": False}
    expected, found = (
        model.generate(texts, **asked) for model, texts in zip((pair.eager, pair.ours), encoded, strict=True)
    )
    assert difference(expected, found) <= 1


def test_keys_and_values_once_per_text(folders, monkeypatch):
    pair = Pair(folders["sd"])
    project, calls = CrossAttention._project, []

    def counted(layer: CrossAttention, *arguments: Any) -> Any:
        calls.append(layer)
        return project(layer, *arguments)

    monkeypatch.setattr(CrossAttention, "_project", counted)
    for times in (1, 2):
        pair.ours.generate(PROMPTS, num_inference_steps=7, progress=False)
        assert len(calls) == times * len(pair.ours.pipeline.unet.cross_attentions)


def test_weights_and_adapters_that_change(folders):
    pair = Pair(folders["sd"])
    first = pair.check()
    before = pair.num_compiled
    for model in (pair.eager, pair.ours):
        with torch.no_grad():
            for attention in model.pipeline.unet.cross_attentions.values():
                attention.v_proj.weight.mul_(-3)
    second = pair.check()
    assert pair.num_compiled == before
    assert difference(first, second) > 1
    from peft import LoraConfig

    for model in (pair.eager, pair.ours):
        torch.manual_seed(3)
        config = LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_v"], init_lora_weights=False)
        model.pipeline.unet.add_adapter(config)
    third = pair.check()
    assert difference(second, third) > 1
    for model in (pair.eager, pair.ours):
        model.pipeline.unet.set_adapters(["default"], weights=[3.0])
    assert difference(third, pair.check()) > 1
    for model in (pair.eager, pair.ours):
        model.pipeline.unet.delete_adapters("default")
    assert difference(pair.check(), second) <= 1
    for model in (pair.eager, pair.ours):
        model.pipeline.enable_freeu(s1=0.9, s2=0.2, b1=1.4, b2=1.6)
    assert difference(pair.check(), second) > 1


@torch.no_grad()
def test_weights_written_to_through_data():
    """They keep their version: a text that is held is projected again whenever drawing begins."""
    unet = UNet.from_stock(pixel_parts()["unet"])
    steps = CompiledUNet(unet, backend="eager")
    text, sample = torch.randn(2, 13, 20), torch.randn(2, 12, 6, 4)
    found = []
    for _ in range(2):
        expected = unet(sample, 7, text).sample
        with steps.installed():
            for _ in range(2):
                found.append(unet(sample, 7, text).sample)
                torch.testing.assert_close(found[-1], expected)
        for attention in unet.cross_attentions.values():
            attention.v_proj.weight.data.mul_(-3)
    assert not torch.allclose(found[0], found[-1], atol=1e-4)
    assert steps.num_graphs == 1


def test_another_backend_of_one_layer_is_compiled_anew(folders):
    pair = Pair(folders["sd"])
    pair.check()
    before = pair.num_compiled
    next(iter(pair.ours.pipeline.unet.cross_attentions.values())).backend = "eager"
    for _ in range(2):
        pair.check()
        assert pair.num_compiled == 2 * before + 1  # a block of the same width keeps its own


def test_a_chosen_backend_is_compiled_in(folders):
    pair = Pair(folders["sd"])
    pair.check()
    before = pair.num_compiled
    for _ in range(2):
        with use_backend("eager", role="cross"):
            pair.check()
    pair.check()
    assert pair.num_compiled == 2 * before


def test_in_a_pipeline_of_diffusers():
    """Its own call, with the U-Net's steps compiled, and as it was afterwards."""
    pipe = stable_diffusion()
    pipe.unet = UNet.from_stock(pipe.unet)
    steps = CompiledUNet(pipe.unet, backend="eager")
    asked = {"num_inference_steps": STEPS, "output_type": "np"}

    def draw() -> Any:
        return pipe(PROMPTS[:2], generator=torch.Generator().manual_seed(2), **asked).images

    expected = draw()
    with steps.installed():
        found = draw()
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert steps.num_graphs == 1
    assert "forward" not in pipe.unet.__dict__
    np.testing.assert_array_equal(draw(), expected)


@torch.no_grad()
@pytest.mark.parametrize("per_prompt", [1, 3])
def test_padded_texts_of_several_lengths(per_prompt):
    """A `UNetContext` with a mask: lengths are rounded up, and padding that is NaN never shows."""
    unet = UNet.from_stock(pixel_parts()["unet"])
    counter = CompileCounterWithBackend("eager")
    steps = CompiledUNet(unet, backend=counter)
    compiled = []
    for length in (13, 19, 31, 5):
        text = torch.randn(2, length, 20)
        mask = torch.arange(length) < torch.tensor([[length - 2], [3]])
        text[~mask] = torch.nan
        sample = torch.randn(2 * per_prompt, 12, 6, 4)
        context = UNetContext(text, mask)
        expected = unet(sample, 7, UNetContext(text.nan_to_num(), mask)).sample
        with steps.installed():
            for _ in range(2):
                torch.testing.assert_close(unet(sample, 7, context).sample, expected)
        compiled.append(counter.frame_count)
    assert len(set(compiled)) == 1
    assert steps.num_graphs == 2


def test_what_is_refused(folders):
    ours = TextToImage.from_pretrained(folders["sd"], device="cpu", compile=True)
    assert ours.compiled is not None
    unet = ours.pipeline.unet
    asked = {"num_inference_steps": 1, "progress": False}
    with mmattn.record_attention(ours), pytest.raises(UsageError, match="recorded or steered in compiled steps"):
        ours.generate(PROMPTS[0], **asked)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(UsageError, match="does not go with autocast"):
        ours.generate(PROMPTS[0], **asked)
    hook = unet.mid_block.register_forward_hook(lambda *_: None)
    with pytest.raises(UsageError, match="a UNetMidBlock2DCrossAttn of the U-Net has a forward hook, which a compil"):
        ours.generate(PROMPTS[0], **asked)
    hook.remove()
    unet.mid_block.forward = unet.mid_block.forward
    with pytest.raises(UsageError, match="compile: mid_block has another forward or hooks of accelerate or diffusers"):
        ours.generate(PROMPTS[0], **asked)
    del unet.mid_block.forward
    sample, text = torch.randn(2, 4, 4, 4), torch.randn(2, 5, unet.config.cross_attention_dim)
    with ours.compiled.installed():
        with pytest.raises(UsageError, match="for inference: call eval.., under torch.no_grad"):
            unet(sample, 1, text)
        with torch.no_grad(), pytest.raises(UsageError, match="takes no cross_attention_kwargs: leave compile out"):
            unet(sample, 1, text, cross_attention_kwargs={"scale": 0.5})
        with torch.no_grad(), pytest.raises(UsageError, match="this U-Net takes a width of"):
            unet(sample, 1, text[..., 1:])
    ours.pipeline.unet = UNet.from_config(unet.config)
    with pytest.raises(UsageError, match="has another U-Net than the one that was compiled: call compile.. again"):
        ours.generate(PROMPTS[0], **asked)
    with pytest.raises(UsageError, match="compiles mmattn.UNet, not a UNet2DConditionModel: open it with UNet.from_"):
        TextToImage(stable_diffusion()).compile()
    with torch.device("meta"):
        on_meta = UNet.from_config(unet.config)
    with pytest.raises(UsageError, match="compile=True works on cpu and cuda, the network is on meta: leave it out"):
        CompiledUNet(on_meta)
    with pytest.raises(UsageError, match="use_graphs=True needs a CUDA device, the network is on cpu"):
        CompiledUNet(unet, use_graphs=True)


def test_a_machine_that_cannot_compile(folders):
    def backend(*_: Any) -> Any:
        raise ValueError("no compiler here\nand more lines")

    ours = TextToImage.from_pretrained(folders["sd"], device="cpu")
    expected = ours.generate(PROMPTS[0], num_inference_steps=1, progress=False)
    ours.compile(backend=backend)  # type: ignore[arg-type]
    with pytest.raises(RunError, match=r"compile=True: the step cannot be compiled here: .*; leave compile out$"):
        ours.generate(PROMPTS[0], num_inference_steps=1, progress=False)
    ours.compiled = None
    assert difference(ours.generate(PROMPTS[0], num_inference_steps=1, progress=False), expected) == 0


@pytest.mark.slow
def test_compiled_by_inductor(folders):
    pair = Pair(folders["sd"], backend="inductor")
    height, width = (8 * side for side in pair.ours.size)  # each layer's places are multiples of 16, as in real sizes
    pair.check(height=height, width=width)
    before = pair.num_compiled
    assert before == 3  # the widths
    pair.check(PROMPTS[:2], height=height, width=width, num_inference_steps=STEPS + 1)
    pair.check(PROMPTS[:2], height=2 * height, width=width)
    assert pair.num_compiled == before
