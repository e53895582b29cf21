"""Steering over the steps of a generation: where it begins, which of its steps count, and what is remembered."""

from __future__ import annotations

import logging
import threading

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline

import mmattn
from mmattn.errors import UsageError
from mmattn.maps import PromptEdit, prompt_memory
from mmattn.maps.prompt_memory import PromptMemory
from mmattn.ops.observe import observing
from tests.inference.tiny_pipelines import seeds
from tests.swap.diffusers_pieces import draw as noise
from tests.swap.zoo_base import quiet

from .steered import EDITED, PROMPT, build, run


@pytest.fixture(scope="module")
def pipe():
    return build("sd")


@pytest.fixture(scope="module")
def image_to_image(pipe):
    return quiet(StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False))


def steered_calls(pipe, draw, **wanted) -> int:
    """How many cross-attention calls were steered; a stock U-Net makes mmattn's calls for nothing else."""
    calls = []
    with observing(lambda call: calls.append(call.role)), mmattn.steer_attention(pipe, **wanted):
        draw()
    return calls.count("cross")


def redraw(pipe, prompts, generators, strength=0.5, steps=10):
    picture = noise(len(generators), 3, 32, 32, seed=2).sigmoid()
    picture = picture[:1].expand_as(picture)
    settings = {"strength": strength, "num_inference_steps": steps, "output_type": "latent", "guidance_scale": 3.0}
    with torch.no_grad():
        return pipe(prompts, image=picture, generator=generators, **settings).images


@pytest.mark.parametrize("edit", ["replace", PromptEdit("refine", self_steps=0.5)], ids=["replace", "refine"])
def test_edits_in_inference_mode(pipe, edit):
    with mmattn.steer_attention(pipe, edit=edit):
        expected = run(pipe, [PROMPT, EDITED])
    with torch.inference_mode(), mmattn.steer_attention(pipe, edit=edit):
        found = run(pipe, [PROMPT, EDITED])
        again = run(pipe, [PROMPT, EDITED])
    assert torch.equal(found, expected)
    assert torch.equal(again, expected)
    with torch.inference_mode(), mmattn.steer_attention(pipe, edit=edit):
        with pytest.raises(UsageError, match="start from different noise"):
            pipe([PROMPT, EDITED], num_inference_steps=2, generator=seeds(3, 4))
        assert torch.equal(run(pipe, [PROMPT, EDITED]), expected)


def test_a_text_that_is_changed_in_place_in_inference_mode():
    """Without a version, a tensor is known by its contents."""
    pipe = build("sd")
    with torch.inference_mode(), mmattn.steer_attention(pipe, weights={"red": 3}):
        red, other = (pipe.encode_prompt(text, "cpu", 1, False)[0].clone() for text in (PROMPT, "red and a star"))
        pipe._guidance_scale = 1
        sample = noise(1, 4, 4, 4, seed=3)
        expected = pipe.unet(sample, 3, other).sample
        pipe.unet(sample, 3, red)
        red.copy_(other)
        assert torch.equal(pipe.unet(sample, 3, red).sample, expected)


@pytest.mark.parametrize(("strength", "begun"), [(0.5, 5), (1.0, 10), (0.2, 2)])
def test_shares_are_of_the_steps_that_image_to_image_has_left(image_to_image, strength, begun):
    layers = sum("attn2" in name for name in image_to_image.unet.attn_processors)

    def draw():
        redraw(image_to_image, PROMPT, seeds(3), strength)

    for share, steps in ((0.4, -(-2 * begun // 5)), (1.0, begun), (0.05, 1)):
        assert steered_calls(image_to_image, draw, weights={"red": 5.0}, steps=share) == steps * layers
    edit = PromptEdit("replace", cross_steps=0.4, self_steps=0)
    count = steered_calls(
        image_to_image, lambda: redraw(image_to_image, [PROMPT, EDITED], seeds(3, 3), strength), edit=edit
    )
    assert count == -(-2 * begun // 5) * layers


def test_a_second_generation_counts_anew(pipe, image_to_image):
    """Also a shorter one, one of other prompts, and one that begins where the last one ended."""
    with mmattn.steer_attention(image_to_image, weights={"red": 5.0}, steps=0.5):
        expected = [redraw(image_to_image, PROMPT, seeds(3), strength, steps=4) for strength in (0.25, 1.0, 0.5)]
    for strength, one in zip((0.25, 1.0, 0.5), expected, strict=True):
        with mmattn.steer_attention(image_to_image, weights={"red": 5.0}, steps=0.5):
            assert torch.equal(redraw(image_to_image, PROMPT, seeds(3), strength, steps=4), one)


def test_prompts_that_a_callback_encodes_begin_no_generation(pipe):
    def encode(pipeline, step, time, given):
        pipeline.encode_prompt("a blue star", "cpu", 1, True)
        return given

    wanted = {"weights": {"red": 5.0}, "steps": 0.5}
    kept = steered_calls(pipe, lambda: run(pipe, steps=4), **wanted)
    assert steered_calls(pipe, lambda: run(pipe, steps=4, callback_on_step_end=encode), **wanted) == kept > 0
    with mmattn.record_attention(pipe) as maps:
        for _ in range(2):
            run(pipe, steps=1, callback_on_step_end=encode)
        run(pipe, steps=4, callback_on_step_end=encode)
    assert [set(each.counts.values()) for each in maps.texts] == [{1}, {1}, {4}]


def test_inpainting(pipe):
    made = quiet(StableDiffusionInpaintPipeline(**pipe.components, requires_safety_checker=False))
    picture, mask = noise(1, 3, 32, 32, seed=2).sigmoid(), torch.ones(1, 1, 32, 32)
    settings = {"image": picture, "mask_image": mask, "num_inference_steps": 4, "output_type": "latent"}

    def draw():
        with torch.no_grad():
            return made(PROMPT, strength=0.5, generator=seeds(3), **settings).images

    plain = draw()
    with mmattn.steer_attention(made, weights={"red": 5.0}, steps=0.5):
        assert not torch.equal(draw(), plain)


@pytest.mark.parametrize(
    "wanted",
    [
        {"weights": {"red": 3}, "steps": 0},
        {"edit": PromptEdit("replace", cross_steps=0, self_steps=0)},
        {"edit": PromptEdit("replace", cross_steps=0, self_steps=1, max_self_tokens=0)},
    ],
    ids=["weights", "edit", "sizes"],
)
def test_a_block_in_vain_is_warned_of_once(pipe, wanted, caplog):
    with caplog.at_level(logging.WARNING), mmattn.steer_attention(pipe, **wanted):
        for _ in range(2):
            run(pipe, [PROMPT, EDITED if "edit" in wanted else PROMPT])
    assert caplog.text.count("steer_attention: nothing was changed: the shares of the steps leave no step") == 1


def test_nothing_is_warned_of_where_nothing_was_asked_for(pipe, caplog):
    with caplog.at_level(logging.WARNING):
        with mmattn.steer_attention(pipe, weights={"red": 1}):
            run(pipe)
        with mmattn.steer_attention(pipe, weights={"red": 2}, steps=0.01):
            run(pipe)
    assert "steer_attention" not in caplog.text


def test_prompts_are_remembered_once_each_and_the_last_ones_only(pipe, monkeypatch):
    memory, states = PromptMemory(), torch.randn(1, 5, 3)
    for _ in range(3):
        memory.note({"prompt": "a"}, (states, states + 1))
    assert len(memory._encoded) == 2
    monkeypatch.setattr(prompt_memory, "MOST_TEXTS", 4)
    for number in range(7):
        memory.note({"prompt": str(number)}, (states + number, None))
    assert [encoded.text for encoded in memory._encoded] == ["3", "4", "5", "6"]
    # Of one call none is forgotten.
    memory.note({"prompt": list("abcdefg")}, (torch.randn(14, 5, 3), None))
    assert "".join(encoded.text for encoded in memory._encoded) == "abcdefg"
    monkeypatch.setattr(prompt_memory, "MOST_BYTES", 2 * states.nbytes)
    memory.note({"prompt": "h"}, (states, None))
    assert [encoded.text for encoded in memory._encoded] == ["g", "h"]
    with mmattn.steer_attention(pipe, weights={"red": 2}):
        old = pipe.encode_prompt("a red star", "cpu", 1, False)[0]
        for number in range(5):
            run(pipe, f"a red circle {number}", steps=1)
        with pytest.raises(UsageError, match="encode them within the block"):
            pipe(prompt_embeds=old, guidance_scale=1, num_inference_steps=1)


def test_threads_that_record_and_steer_one_pipeline_leave_it_as_it_was(pipe):
    """Whoever comes first need not be the last to go."""
    before = set(vars(pipe))
    first, second, gone = (threading.Event() for _ in range(3))
    failed = []

    def one():
        try:
            with mmattn.record_attention(pipe) as maps:
                first.set()
                assert second.wait(60)
                run(pipe, "a blue star", steps=1)
            assert [picture.prompt.text for picture in maps.texts] == ["a blue star"]
        except BaseException as error:
            failed.append(error)
        gone.set()

    def other():
        try:
            assert first.wait(60)
            with mmattn.record_attention(pipe) as maps, mmattn.steer_attention(pipe, weights={"red": 2}):
                second.set()
                assert gone.wait(60)
                run(pipe, "a red star", steps=1)
            assert [picture.prompt.text for picture in maps.texts] == ["a red star"]
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=each) for each in (one, other)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert set(vars(pipe)) == before
