"""Which words a drawn picture has, however its prompt got to the pipeline; and what happens at an interrupt."""

from __future__ import annotations

import copy
import logging
import threading

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from torch.overrides import _get_current_function_mode_stack

from mmattn import UNet, record_attention
from mmattn.errors import UsageError
from mmattn.inference.diffusion.pixel_pipeline import PixelPipeline
from mmattn.ops.observe import OBSERVERS
from tests.inference.tiny_pipelines import pixel_parts, stable_diffusion, stable_diffusion_xl
from tests.swap import zoo_sd
from tests.swap.zoo_base import quiet

from .test_denoising import PROMPTS, draw, state_of

OTHERS = ["a green square", "a blue circle and so on"]


@pytest.fixture(scope="module")
def pipe():
    return stable_diffusion()


def encode(pipe, prompts, negatives=None):
    """The arguments of a call with embeddings."""
    if isinstance(pipe, PixelPipeline):
        found = {"prompt_embeds": pipe.encode_prompt(prompts)}
        if negatives is not None:
            found["negative_prompt_embeds"] = pipe.encode_prompt(negatives)
        given = {}
        for name, encoded in found.items():
            given |= {name: encoded.states, name.replace("embeds", "attention_mask"): encoded.key_mask}
        return given
    guided = {"do_classifier_free_guidance": negatives is not None, "negative_prompt": negatives}
    found = pipe.encode_prompt(prompts, device="cpu", num_images_per_prompt=1, **guided)
    names = ["prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"]
    return {name: each for name, each in zip(names, found, strict=False) if each is not None}


@pytest.mark.parametrize("kind", ["sd", "xl", "pixels", "ours pixels"])
def test_embeddings_made_within_the_block_keep_their_words(kind):
    """Not those of the text that was encoded last."""
    made = {"sd": stable_diffusion, "xl": stable_diffusion_xl}.get(kind, lambda: quiet(PixelPipeline(**pixel_parts())))
    pipe = made()
    if kind.startswith("ours"):
        pipe.unet = UNet.from_stock(pipe.unet)
    sizes = {} if "pixels" not in kind else {"height": 12, "width": 8}
    with record_attention(pipe) as maps, record_attention(pipe, guidance="unconditional") as negative:
        mine = encode(pipe, PROMPTS, ["no star", "nothing"])
        encode(pipe, OTHERS, ["a", "no"])
        draw(pipe, None, **mine, **sizes)
    assert [picture.prompt.text for picture in maps.texts] == PROMPTS
    assert [picture.prompt.text for picture in negative.texts] == ["no star", "nothing"]
    assert maps.heatmap("star", 1).word == "star"


@pytest.mark.parametrize("kind", ["sd", "pixels"])
def test_other_embeddings_have_no_words(kind):
    """Prompts were encoded within the block, but what is drawn is none of them."""
    pipe = stable_diffusion() if kind == "sd" else quiet(PixelPipeline(**pixel_parts()))
    sizes = {} if kind == "sd" else {"height": 12, "width": 8}
    with record_attention(pipe) as maps:
        given = encode(pipe, PROMPTS, ["", ""])
        given["prompt_embeds"] = given["prompt_embeds"] * 1.5
        draw(pipe, None, **given, **sizes)
        draw(pipe, OTHERS, **sizes)
    assert [picture.prompt and picture.prompt.text for picture in maps.texts] == [None, None, *OTHERS]
    with pytest.raises(UsageError, match="only its embeddings"):
        maps.heatmap("red")


def test_prompts_that_are_given_come_first(pipe):
    with record_attention(pipe, prompts=["a star", "a square"]) as maps:
        draw(pipe)
    assert [picture.prompt.text for picture in maps.texts] == ["a star", "a square"]


@pytest.mark.parametrize(("count", "guidance"), [(1, "unconditional"), (1, "both"), (3, "unconditional")])
def test_other_prompts_than_negative_ones(pipe, count, guidance):
    given = {"prompts": OTHERS[:1] * count, "guidance": guidance, "steps": 0}
    message = f"^record_attention: {count} prompts and 2 negative prompts: give one negative prompt, or one for each"
    with pytest.raises(UsageError, match=message), record_attention(pipe, **given):
        draw(pipe, negative_prompt=["no star", "nothing"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokens": [500]}, r"tokens has 500, but the text has 11 tokens, 0 to 10"),
        ({"tokens": [2, 11]}, r"tokens has 11, but the text has 11 tokens"),
        ({"tokens": [-1]}, "tokens has -1; give words, or positions of 0 or more"),
        ({"tokens": [True]}, "tokens has True; give words"),
        ({"tokens": " "}, "tokens has ' '; give words"),
        ({"layers": []}, r"layers is \[\]; give numbers of 0 or more, or parts of the layers' names"),
        ({"layers": [0, 99]}, r"layers has 99, which is not there: there are 0 \(down_blocks"),
        ({"layers": -1}, "layers is -1; give numbers"),
        ({"layers": ""}, "layers is ''; give numbers"),
        ({"heads": []}, r"heads is \[\]; give numbers"),
        ({"heads": [0, 2]}, r"heads=\[0, 2\], but there are 2 heads"),
        ({"heads": True}, r"heads is \[True\]; give numbers"),
        ({"steps": [0, 3]}, r"steps=\[0, 3\], but this generation has 3 steps, 0 to 2"),
        ({"steps": -1}, r"steps is \[-1\]; give numbers"),
    ],
)
def test_numbers_that_are_not_there(pipe, arguments, message):
    before = state_of(pipe.unet)
    with pytest.raises(UsageError, match=message), record_attention(pipe, **arguments):
        draw(pipe)
    assert state_of(pipe.unet) == before


@pytest.mark.parametrize("name", ["layer", "head", "step"])
def test_no_number_at_all_is_refused_when_asked_for(pipe, name):
    with record_attention(pipe, views=["head", "step"]) as maps:
        draw(pipe, num_inference_steps=1)
    with pytest.raises(UsageError, match=rf"{name}=\[\]: give one or more numbers, or leave it out"):
        maps.array(**{name: []})


def test_steps_that_image_to_image_did_not_run_are_warned_of(pipe, caplog):
    later = quiet(StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False))
    picture = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    settings = {"image": picture, "strength": 0.5, "num_inference_steps": 4, "output_type": "latent"}
    with caplog.at_level(logging.WARNING), record_attention(later, steps=[0, 3]) as maps, torch.no_grad():
        later("a red circle", **settings)
    assert len(maps) == 1
    assert "steps=[0, 3], but there were 2 steps, 0 to 1" in caplog.text


def interrupted(model, record):
    """Recording in which the last projection of a cross-attention is interrupted."""

    def interrupt(*_):
        raise KeyboardInterrupt

    layer = next(module for name, module in model.named_modules() if name.endswith("attn2"))
    hook = layer.to_out[0].register_forward_pre_hook(interrupt)
    try:
        record(hook)
    finally:
        hook.remove()


def test_an_interrupt_leaves_nothing_behind(pipe):
    before, plain = state_of(pipe.unet), draw(pipe)

    def outside(hook):
        with pytest.raises(KeyboardInterrupt), record_attention(pipe), record_attention(pipe, layers=0):
            draw(pipe)

    def inside(hook):
        with record_attention(pipe) as maps:
            with pytest.raises(KeyboardInterrupt):
                draw(pipe)
            hook.remove()
            assert torch.equal(draw(pipe), plain)
        assert len(maps) == 2

    for record in (outside, inside):
        interrupted(pipe.unet, record)
        assert _get_current_function_mode_stack() == []
        assert OBSERVERS.get() == ()
        assert state_of(pipe.unet) == before
        assert "encode_prompt" not in vars(pipe)


def test_another_thread_runs_the_same_layers_meanwhile(pipe):
    """Its forwards neither open nor close what this one's have opened.

    Its tokenizer and scheduler are its own: those of the libraries have a state of the last call.
    """
    parts = {name: copy.deepcopy(pipe.components[name]) for name in ("tokenizer", "scheduler")}
    other = quiet(StableDiffusionPipeline(**{**pipe.components, **parts}, requires_safety_checker=False))
    plain, found, failed = draw(pipe), [], []
    barrier = threading.Barrier(2)

    def record():
        try:
            barrier.wait(60)
            with record_attention(pipe) as maps:
                found.append(draw(pipe))
            assert set(maps.texts[0].counts.values()) == {3}
        except BaseException as error:
            failed.append(error)

    def run():
        barrier.wait(60)
        found.extend(draw(other) for _ in range(2))

    threads = [threading.Thread(target=each) for each in (record, run)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert len(found) == 3
    assert all(torch.equal(one, plain) for one in found)


def test_a_unet_by_itself_knows_how_long_its_text_is(pipe):
    text = torch.randn(1, 7, zoo_sd.TEXT, generator=torch.Generator().manual_seed(3))
    with (
        record_attention(pipe.unet, tokens=[6, 7]),
        torch.no_grad(),
        pytest.raises(UsageError, match="tokens has 7, but the text has 7 tokens, 0 to 6"),
    ):
        pipe.unet(torch.randn(1, 4, 6, 4), 3, text)
