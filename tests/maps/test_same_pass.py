"""Recording takes maps from the attention's own pass where its backend gives them, and from nowhere else then."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import pytest
import torch

from mmattn import TextToImage, Translator, UNet, record_attention, swap_attention
from mmattn.errors import UsageError
from mmattn.maps.recordings import RecordedPicture
from tests.inference.stock_decoder import tiny_marian
from tests.inference.tiny_pipelines import stable_diffusion
from tests.inference.tiny_translators import ENGLISH, save_own_translator
from tests.maps.same_pass import giving_maps
from tests.maps.test_denoising import PROMPTS, STEPS, draw
from tests.swap.zoo_sd import TEXT


@pytest.fixture(scope="module")
def pipe():
    made = stable_diffusion()
    swap_attention(made, parts=["unet"])
    return made


def both_ways(target, run, **arguments):
    """What is recorded with a backend that gives maps, and what without; results are the same."""
    with giving_maps() as stand:
        plain = run()
        assert not stand.asked
        with record_attention(target, **arguments) as maps:
            recorded = run()
    assert torch.equal(torch.as_tensor(recorded), torch.as_tensor(plain))
    with record_attention(target, **arguments) as expected:
        run()
    assert len(maps) == len(expected) > 0
    for got, wanted in zip(maps.texts, expected.texts, strict=True):
        assert got.weights.keys() == wanted.weights.keys()
        for layer, weights in wanted.weights.items():
            assert got.weights[layer].shape == weights.shape
            assert got.weights[layer].dtype is torch.float32
            torch.testing.assert_close(got.weights[layer], weights, atol=1e-5, rtol=1e-4)
    return stand, maps


@pytest.mark.parametrize(
    ("arguments", "settings"),
    [
        ({}, {}),
        ({"tokens": ["red circle", "star"]}, {}),  # two tokens of the first prompt, one of the second
        ({"tokens": ["red", 9], "heads": [1], "views": ["head", "step"], "steps": [0, 2]}, {}),
        ({"guidance": "unconditional", "tokens": [0]}, {"negative_prompt": ["no green square", "nothing"]}),
        ({"guidance": "both", "layers": "mid_block"}, {}),
        ({"tokens": ["red circle"]}, {"guidance_scale": 1.0, "num_images_per_prompt": 2}),
        ({"role": "self", "layers": [1]}, {}),
    ],
    ids=["all", "words", "views", "unconditional", "both", "unguided", "self"],
)
def test_pictures(pipe, arguments, settings):
    stand, maps = both_ways(pipe, lambda: draw(pipe, **settings), **arguments)
    steps = STEPS if "steps" not in arguments else len(arguments["steps"])
    assert len(stand.asked) == steps * len(maps.layer_names)
    assert len({id(asked) for asked in stand.asked}) == 1, "what was asked is made once for a generation"
    assert stand.computed_again == 0


def test_rows_that_share_their_keys():
    """Pictures of one text have its keys in common, their queries one after the other."""
    unet, draws = UNet.from_stock(stable_diffusion().unet), torch.Generator().manual_seed(3)
    sample, text = (torch.randn(*shape, generator=draws) for shape in ((6, 4, 6, 4), (3, 11, TEXT)))

    @torch.no_grad()
    def run():
        return unet(sample, 500, unet.project_context(text)).sample

    stand, maps = both_ways(unet, run, tokens=[3, 0])
    assert len(maps) == 6
    assert {(asked.rows, asked.keys) for asked in stand.asked} == {(range(3), ((0, 3),) * 3)}
    assert stand.computed_again == 0


@pytest.mark.parametrize("kept", [["red circle", "star"], None], ids=str)
def test_our_text_to_image(kept):
    made = stable_diffusion()
    made.unet = UNet.from_stock(made.unet)
    t2i = TextToImage(made)

    def run():
        images = t2i.generate(PROMPTS, num_inference_steps=2, num_images_per_prompt=2, batch_size=4)
        return np.stack([np.asarray(image) for image in images])

    stand, maps = both_ways(t2i, run, tokens=kept)
    assert len(maps) == 4
    assert stand.asked
    assert stand.computed_again == 0


def test_two_recorders(pipe):
    """The outer one gets its maps from the pass; the inner one computes its own, from the same pass's log-sum-exp."""
    outermost = record_attention(pipe, tokens=["red"])
    with giving_maps() as stand, outermost as outer, record_attention(pipe, tokens=["circle"], layers=[0]) as inner:
        draw(pipe, PROMPTS[:1])
    assert stand.computed_again == STEPS
    with record_attention(pipe, tokens=["red", "circle"]) as expected:
        draw(pipe, PROMPTS[:1])
    assert np.allclose(outer.array(layer=0)[..., 0], expected.array(layer=0)[..., 0], atol=1e-6)
    assert np.allclose(inner.array()[..., 0], expected.array(layer=0)[..., 1], atol=1e-6)


def test_heads_that_are_not_there_are_said_to_be():
    unet, draws = stable_diffusion().unet, torch.Generator().manual_seed(3)
    swap_attention(unet)
    sample, text = (torch.randn(*shape, generator=draws) for shape in ((2, 4, 6, 4), (2, 11, TEXT)))
    refused = pytest.raises(UsageError, match=r"heads=\[7\], but there are 2 heads")
    with giving_maps(), refused, record_attention(unet, heads=[7]):
        unet(sample, 500, text)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, contextlib.nullcontext])
def test_a_model_by_itself(mode):
    unet, draws = stable_diffusion().unet, torch.Generator().manual_seed(3)
    swap_attention(unet)
    sample, text = (torch.randn(*shape, generator=draws) for shape in ((2, 4, 6, 4), (2, 11, TEXT)))

    def run():
        with mode():
            return [unet(sample, time, text).sample.detach().clone() for time in (900, 500)][-1]

    stand, maps = both_ways(unet, run, tokens=[3, 0])
    assert stand.computed_again == 0
    picture = maps.texts[0]
    assert isinstance(picture, RecordedPicture)
    picture.sums[0, -1] += 1  # an ordinary tensor, whatever the model ran in


def test_translations(tmp_path_factory):
    folder = save_own_translator(tmp_path_factory.mktemp("own"), files=tmp_path_factory.mktemp("files"))
    translator = Translator.from_pretrained(folder, device="cpu")

    def run():
        translator.translate(ENGLISH[:2], max_new_tokens=7)
        return 0

    for arguments in ({}, {"heads": [1], "role": "self"}):
        stand, _ = both_ways(translator, run, **arguments)
        assert stand.asked
        assert stand.computed_again == 0


def test_transformers_models():
    model: Any = tiny_marian().eval()
    swap_attention(model)
    ids = torch.tensor([[5, 9, 7, 2], [6, 4, 2, 1]])

    def run():
        return model.generate(ids, attention_mask=ids != 1, max_new_tokens=5, num_beams=2)

    stand, _ = both_ways(model, run, heads=[1, 0])
    assert stand.asked
    assert stand.computed_again == 0
