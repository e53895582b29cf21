"""Steering pipelines: nothing changes where nothing is to change, else what the maps written out give; restored."""

from __future__ import annotations

import contextlib
import threading

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline
from PIL import Image

import mmattn
from mmattn.errors import UsageError
from mmattn.inference.text_to_image import TextToImage
from mmattn.maps import PromptEdit
from mmattn.models.unet import UNet
from mmattn.ops.observe import observing
from tests.inference.tiny_pipelines import seeds
from tests.swap.diffusers_pieces import Picture, add_lora
from tests.swap.diffusers_pieces import draw as noise
from tests.swap.zoo_base import quiet, seeded
from tests.swap.zoo_sd import load_adapters, plain_projection, plus_projection

from .steered import BLUE, CIRCLE, EDITED, END, KINDS, PROMPT, RED, WrittenOut, build, coverage, run

BOX = (1 / 6, 0.25, 0.75, 1.0)
LARGE = {"height": 64, "width": 96}  # of the small Stable Diffusion: latents of 8 x 12
GRIDS = {96: (8, 12), 24: (4, 6), 6: (2, 3), 2: (1, 2)}


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_to_change_changes_no_bit(kind):
    pipe = build(kind)
    one, pair = run(pipe), run(pipe, [PROMPT, PROMPT])
    before = Picture(pipe)
    ones = np.ones((5, 3), dtype=bool)
    for wanted in ({"weights": {"red": 1}}, {"regions": {"a red circle": (0, 0, 1, 1), "blue": ones}}):
        with mmattn.steer_attention(pipe, **wanted):
            assert torch.equal(run(pipe), one)
    with mmattn.steer_attention(pipe, edit="replace"):
        assert torch.equal(run(pipe, [PROMPT, PROMPT]), pair)
    with mmattn.steer_attention(pipe, weights={"red": 2.5}):
        assert (run(pipe) - one).abs().max() > 1e-4
    with mmattn.steer_attention(pipe, regions={"circle": BOX}):
        assert (run(pipe) - one).abs().max() > 1e-4
    assert torch.equal(run(pipe), one)
    differences = before.differences(Picture(pipe))
    assert [name for name in differences if "context_cache" not in name] == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("edit", [PromptEdit("replace"), PromptEdit("refine", self_steps=0)], ids=["replace", "refine"])
def test_an_edit_leaves_its_source_as_it_is(kind, edit):
    pipe = build(kind)
    before = run(pipe, [PROMPT, EDITED])
    with mmattn.steer_attention(pipe, edit=edit):
        after = run(pipe, [PROMPT, EDITED])
    assert torch.equal(after[0], before[0])
    assert (after[1] - before[1]).abs().max() > 1e-4


def reference(pipe, change, prompts=PROMPT, **settings):
    """Drawn in float64 with maps written out; `change` gets the conditional rows of the text's maps, the step."""
    written = WrittenOut(change, pipe.unet)
    with written.used():
        return run(pipe, prompts, **settings)


def check_equal(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.dtype == torch.float64
    assert (found - expected).abs().max() < 1e-9 * expected.abs().max()


@pytest.mark.parametrize("kind", ["sd", "xl", "ours", "swapped"])
def test_weights_are_what_the_maps_say(kind):
    def change(maps, is_text, step):
        if is_text and step < 2:  # of 3: half of the steps
            maps = maps.clone()
            maps[1:, :, :, RED] *= 2.5
            maps[1:, :, :, CIRCLE] *= 0
            maps = maps / maps.sum(-1, keepdim=True)
        return maps

    expected = reference(build("xl" if kind == "xl" else "sd").to(torch.float64), change)
    pipe = build(kind).to(torch.float64)
    plain = run(pipe)
    with mmattn.steer_attention(pipe, weights={"Red": 2.5, "circle": 0}, steps=0.5):
        found = run(pipe)
    check_equal(found, expected)
    assert (found - plain).abs().max() > 1e-3


@pytest.mark.parametrize(("kind", "end"), [("sd", None), ("sd", 0.3), ("ours", None), ("swapped", 1.0)])
def test_regions_are_what_the_maps_say_on_a_picture_that_is_not_square(kind, end):
    fine = np.zeros((48, 48))
    fine[12:, 8:36] = 1  # the box
    mask = np.zeros((48, 48))
    mask[20:44, 30:] = 1

    def change(maps, is_text, step):
        if is_text:
            maps = maps.clone()
            for positions, region in (([RED, CIRCLE], fine), ([BLUE], mask)):
                share = coverage(region, *GRIDS[maps.shape[2]]).flatten()[:, None]
                maps[1:, :, :, positions] *= share
            maps[1:, :, :, END:] *= end or 0.0
            maps = maps / maps.sum(-1, keepdim=True)
        return maps

    expected = reference(build("sd").to(torch.float64), change, **LARGE)
    pipe = build(kind).to(torch.float64)
    picture = Image.fromarray((mask[::2, ::2] * 255).astype(np.uint8))
    for given in (mask, torch.from_numpy(mask).bool(), picture):
        with mmattn.steer_attention(pipe, regions={"red circle": BOX, "blue": given}, end_weight=end):
            found = run(pipe, **LARGE)
        check_equal(found, expected)


@pytest.mark.parametrize("kind", ["sd", "ours", "swapped"])
def test_replacing_words_is_what_the_maps_say(kind):
    def change(maps, is_text, step):
        maps = maps.clone()
        if is_text and step < 3:  # of 4: 0.6 of the steps
            maps[3] = maps[2]  # words have a token each: columns stay where they are
            maps[3, :, :, RED] *= -1.5
        elif not is_text and step < 1 and maps.shape[2] <= 24:
            maps[3] = maps[2]
        return maps

    prompts = [PROMPT, EDITED]
    expected = reference(build("sd").to(torch.float64), change, prompts, steps=4, **LARGE)
    pipe = build(kind).to(torch.float64)
    edit = PromptEdit("replace", cross_steps=0.6, self_steps=0.25, max_self_tokens=24, weights={"green": -1.5})
    with mmattn.steer_attention(pipe, edit=edit):
        found = run(pipe, prompts, steps=4, **LARGE)
    check_equal(found, expected)


@pytest.mark.parametrize("kind", ["sd", "ours", "swapped"])
def test_refining_is_what_the_maps_say(kind):
    source, edited = "a red circle above a square", "a red green circle above a square"

    def change(maps, is_text, step):
        maps = maps.clone()
        if is_text:
            own = maps[3].clone()
            maps[3, :, :, :3] = maps[2, :, :, :3]
            maps[3, :, :, 4:] = maps[2, :, :, 3:-1]
            maps[3, :, :, 3] = own[:, :, 3] * 2
        return maps

    expected = reference(build("sd").to(torch.float64), change, [source, edited])
    pipe = build(kind).to(torch.float64)
    with mmattn.steer_attention(pipe, edit=PromptEdit("refine", 1.0, 0, weights={"green": 2})):
        found = run(pipe, [source, edited])
    check_equal(found, expected)


def test_reweighting_a_prompt_beside_itself():
    def change(maps, is_text, step):
        if is_text:
            maps = maps.clone()
            maps[3] = maps[2]
            maps[3, :, :, RED] *= 3
        return maps

    prompts = [PROMPT, PROMPT]
    expected = reference(build("sd").to(torch.float64), change, prompts)
    pipe = build("sd").to(torch.float64)
    with mmattn.steer_attention(pipe, edit=PromptEdit("reweight", 1.0, 0, weights={"red": 3})):
        check_equal(run(pipe, prompts), expected)


def with_adapters(kind: str = "sd"):
    """LoRA on every projection and two IP-Adapters, all with random weights."""
    pipe = build("sd")
    seeded(lambda: load_adapters(pipe, [plain_projection(), plus_projection()], [0.7, 0.4]))()
    add_lora(pipe.unet, "to_q", "to_k", "to_v", "to_out.0")
    pipe.unet.eval()
    if kind == "swapped":
        mmattn.swap_attention(pipe)
    return pipe


@pytest.mark.parametrize("kind", ["sd", "swapped"])
def test_lora_and_ip_adapters_stay_alive(kind):
    pictures = [noise(2, 1, 56, seed=4).double(), noise(2, 1, 17, 52, seed=5).double()]
    settings = {"ip_adapter_image_embeds": pictures, "cross_attention_kwargs": {"scale": 0.5}}

    def change(maps, is_text, step):
        if is_text:
            maps = maps.clone()
            maps[1:, :, :, RED] *= 2.5
            maps = maps / maps.sum(-1, keepdim=True)
        return maps

    expected = reference(with_adapters().to(torch.float64), change, **settings)
    pipe = with_adapters(kind).to(torch.float64)
    plain, before = run(pipe, **settings), Picture(pipe)
    with mmattn.steer_attention(pipe, weights={"red": 2.5}):
        check_equal(run(pipe, **settings), expected)
        pipe.set_ip_adapter_scale([0.0, 0.0])
        without = run(pipe, **settings)
        pipe.set_ip_adapter_scale([0.7, 0.4])
        no_lora = run(pipe, ip_adapter_image_embeds=pictures, cross_attention_kwargs={"scale": 0.0})
    for other in (plain, without, no_lora):
        assert (other - expected).abs().max() > 1e-3
    assert [name for name in before.differences(Picture(pipe)) if "context_cache" not in name] == []
    with mmattn.steer_attention(pipe, weights={"red": 1}):
        assert torch.equal(run(pipe, **settings), plain)
    edit = PromptEdit("replace", 1.0, 1.0)
    both = [PROMPT, EDITED]
    unedited = run(pipe, both, **settings)
    with mmattn.steer_attention(pipe, edit=edit):
        edited = run(pipe, both, **settings)
    check_equal(edited[0], unedited[0])
    assert (edited[1] - unedited[1]).abs().max() > 1e-3


def test_padding_that_a_swap_leaves_out(tmp_path):
    """A stock U-Net in the pixel pipeline gets a mask; the swap cuts the padding off."""
    prompts = [PROMPT, "a red star"]
    stock, swapped = build("pixels"), build("pixels")
    mmattn.swap_attention(swapped)
    ours = build("ours pixels")
    found = []
    for pipe in (stock, swapped, ours):
        with mmattn.steer_attention(pipe, weights={"red": 3}, regions={"red": (0, 0, 0.5, 1)}):
            found.append(run(pipe, prompts))
    for other in found[1:]:
        assert (other - found[0]).abs().max() < 1e-4
    with mmattn.steer_attention(stock, edit="refine"):
        first = run(stock, prompts)
    with mmattn.steer_attention(ours, edit="refine"):
        assert (run(ours, prompts) - first).abs().max() < 1e-4


@pytest.mark.parametrize("kind", ["ours", "ours pixels"])
def test_text_to_image_whatever_the_batch(kind):
    t2i = TextToImage(build(kind))
    settings = {"num_inference_steps": 2, "seed": 3, "progress": False}
    with mmattn.steer_attention(t2i, weights={"red": 3}, regions={"red circle": BOX}):
        together = t2i.generate([PROMPT, "a red circle"], num_images_per_prompt=2, **settings)
        alone = [
            picture
            for prompt in (PROMPT, "a red circle")
            for picture in t2i.generate(prompt, num_images_per_prompt=2, batch_size=1, **settings)
        ]
    plain = t2i.generate([PROMPT, "a red circle"], num_images_per_prompt=2, **settings)
    for one, other, third in zip(together, alone, plain, strict=True):
        pixels = [np.asarray(picture).astype(int) for picture in (one, other, third)]
        assert np.abs(pixels[0] - pixels[1]).max() <= 1
        assert np.abs(pixels[0] - pixels[2]).max() > 1
    with mmattn.steer_attention(t2i, edit="replace"):
        pairs = t2i.generate([PROMPT, EDITED], num_images_per_prompt=2, **settings)
        first = t2i.generate([PROMPT, EDITED], **settings)
    for one, other in ((pairs[0], first[0]), (pairs[2], first[1])):
        assert np.abs(np.asarray(one).astype(int) - np.asarray(other)).max() <= 1


def test_pictures_that_share_their_keys_are_folded():
    """A `UNetContext` serves several pictures of a prompt: queries of all of them stand in one row."""
    pipe = build("ours pixels")
    with mmattn.steer_attention(pipe, regions={"red": (0, 0, 0.5, 1)}, weights={"circle": 0.3}):
        together = run(pipe, [PROMPT, "red circle"], num_images_per_prompt=3)
        alone = run(pipe, "red circle")
    assert (together[3:] - alone).abs().max() < 1e-4
    assert (together[:3] - alone).abs().max() > 1e-3


def test_only_the_conditional_half_is_steered():
    """A word of the negative prompt that is also in the prompt."""
    rows = []

    def change(maps, is_text, step):
        if is_text:
            rows.append(len(maps))
            maps = maps.clone()
            maps[1:, :, :, RED] *= 2.5
            maps = maps / maps.sum(-1, keepdim=True)
        return maps

    negative = {"negative_prompt": "a red star"}
    expected = reference(build("sd").to(torch.float64), change, **negative)
    assert set(rows) == {2}
    for kind in ("sd", "ours"):
        pipe = build(kind).to(torch.float64)
        with mmattn.steer_attention(pipe, weights={"red": 2.5}):
            check_equal(run(pipe, **negative), expected)
    # The very same text as prompt and negative prompt: guidance cancels but for the steering.
    for kind in ("sd", "ours pixels"):
        pipe = build(kind)
        same = {"negative_prompt": PROMPT}
        plain = run(pipe, **same)
        with mmattn.steer_attention(pipe, weights={"red": 2.5}):
            assert (run(pipe, **same) - plain).abs().max() > 1e-3


def test_unguided_rows_are_all_steered():
    pipe = build("ours pixels")
    plain = run(pipe, [PROMPT, "a red star"], guidance_scale=1)
    with mmattn.steer_attention(pipe, weights={"red": 3}):
        found = run(pipe, [PROMPT, "a red star"], guidance_scale=1)
    assert ((found - plain).abs().amax(dim=(1, 2, 3)) > 1e-4).all()


def test_restored_after_an_error_and_for_other_threads():
    pipe = build("sd")
    plain, before = run(pipe), Picture(pipe)
    with pytest.raises(KeyError), mmattn.steer_attention(pipe, weights={"red": 3}):
        raise KeyError
    assert before.differences(Picture(pipe)) == []
    found = []
    with mmattn.steer_attention(pipe, weights={"red": 3}):
        worker = threading.Thread(target=lambda: found.append(run(pipe)))
        worker.start()
        worker.join()
        steered = run(pipe)
    assert torch.equal(found[0], plain)
    assert not torch.equal(steered, plain)
    assert before.differences(Picture(pipe)) == []


def test_two_threads_steer_one_u_net_each_in_its_own_way():
    pipes = [build("sd") for _ in range(2)]
    pipes[1].unet = pipes[0].unet
    weights = [{"red": 3.0}, {"blue": 0.2}]
    expected = []
    for pipe, wanted in zip(pipes, weights, strict=True):
        with mmattn.steer_attention(pipe, weights=wanted):
            expected.append(run(pipe))
    before, found, barrier = Picture(pipes[0]), {}, threading.Barrier(2)

    def work(number: int) -> None:
        with mmattn.steer_attention(pipes[number], weights=weights[number]):
            barrier.wait(30)
            found[number] = [run(pipes[number]) for _ in range(2)]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(2):
        assert all(torch.equal(result, expected[number]) for result in found[number])
    assert before.differences(Picture(pipes[0])) == []


def test_one_text_for_pictures_of_two_shapes():
    """As many places, 8 x 12 and 12 x 8, from prompts that were encoded once."""
    t2i = TextToImage(build("ours"))
    settings = {"num_inference_steps": 2, "seed": 3, "progress": False}
    shapes = [LARGE, {"height": 96, "width": 64}]
    found = []
    for is_fresh in (False, True):
        with mmattn.steer_attention(t2i, regions={"red": BOX}):
            encoded = t2i.encode(PROMPT)
            for shape in shapes:
                found.append(np.asarray(t2i.generate(PROMPT if is_fresh else encoded, **shape, **settings)[0]))
    assert np.array_equal(found[0], found[2])
    assert np.array_equal(found[1], found[3])


def test_image_to_image_begins_later():
    pipe = StableDiffusionImg2ImgPipeline(**build("sd").components, requires_safety_checker=False)
    quiet(pipe)
    picture = noise(1, 3, 32, 32, seed=2).sigmoid()
    settings = {"image": picture, "strength": 0.5, "num_inference_steps": 4, "output_type": "latent"}

    def drawn(prompts, generators):
        with torch.no_grad():
            return pipe(prompts, generator=generators, **settings).images

    plain = drawn(PROMPT, seeds(3))
    with mmattn.steer_attention(pipe, weights={"red": 3}):
        assert (drawn(PROMPT, seeds(3)) - plain).abs().max() > 1e-3
    with mmattn.steer_attention(pipe, edit="replace"):
        edited = drawn([PROMPT, EDITED], seeds(3, 3))
        with pytest.raises(UsageError, match="start from different noise"):
            drawn([PROMPT, EDITED], seeds(3, 4))
    assert (edited[0] - plain[0]).abs().max() < 1e-4


@pytest.mark.parametrize("kind", ["sd", "ours"])
@pytest.mark.parametrize("is_outer", [True, False], ids=["record in steer", "steer in record"])
def test_recorded_maps_show_the_steering(kind, is_outer):
    pipe = build(kind)
    with mmattn.record_attention(pipe) as plain:
        run(pipe)
    with mmattn.steer_attention(pipe, weights={"red": 0}):
        expected = run(pipe)
    before = Picture(pipe)
    with contextlib.ExitStack() as stack:
        if is_outer:
            stack.enter_context(mmattn.steer_attention(pipe, weights={"red": 0}))
        maps = stack.enter_context(mmattn.record_attention(pipe))
        if not is_outer:
            stack.enter_context(mmattn.steer_attention(pipe, weights={"red": 0}))
        assert torch.equal(run(pipe), expected)
    assert before.differences(Picture(pipe)) == []
    assert plain.array()[..., RED].max() > 0
    assert maps.array()[..., RED].max() == 0
    np.testing.assert_allclose(maps.array().sum(-1), 1, atol=1e-5)


def test_layers_without_a_change_run_as_they_are():
    """Swapped or steered attention is asked for in cross-attention only, in the steps of an edit only."""
    pipe = build("sd")
    calls = []
    with observing(lambda call: calls.append(call.role)):
        with mmattn.steer_attention(pipe, weights={"red": 3}):
            run(pipe, steps=2)
        num_cross = sum("attn2" in name for name in pipe.unet.attn_processors)
        assert calls == ["cross"] * (2 * num_cross)
        calls.clear()
        with mmattn.steer_attention(pipe, edit=PromptEdit("replace", cross_steps=0.5, self_steps=0)):
            run(pipe, [PROMPT, EDITED], steps=4)
        assert calls == ["cross"] * (2 * num_cross)


def test_half_precision_and_u_net_class():
    pipe = build("ours").to(torch.bfloat16)
    assert isinstance(pipe.unet, UNet)
    with mmattn.steer_attention(pipe, weights={"red": 3}, regions={"circle": BOX}):
        assert run(pipe).isfinite().all()
    with mmattn.steer_attention(pipe, edit=PromptEdit("refine", weights={"green": 2})):
        assert run(pipe, [PROMPT, EDITED]).isfinite().all()
