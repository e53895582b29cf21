"""Compiled steps on a card: one compilation, CUDA graphs replayed, the translations of the ordinary path."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mmattn.inference.text_to_image import TextToImage
from mmattn.inference.translator import Translator
from tests.gpu.card import DEVICE, MARKS
from tests.inference import test_compiled_pictures as compiled_pictures
from tests.inference import test_compiled_vlm as compiled_vlm
from tests.inference.test_compiled import LONG, POSITIONS, Pair
from tests.inference.tiny_models import pictures, save_stock
from tests.inference.tiny_pipelines import stable_diffusion
from tests.inference.tiny_translators import ENGLISH, save_own_translator, save_stock_translator

pytestmark = MARKS


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    new = tmp_path_factory.mktemp
    return {
        "marian": save_stock_translator(new("marian"), "marian", files=new("files"), max_position_embeddings=POSITIONS),
        "own": save_own_translator(new("own"), files=new("files"), max_positions=POSITIONS),
    }


@pytest.fixture(autouse=True)
def no_recompilation():
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield


@pytest.mark.parametrize(("kind", "backend"), [("marian", "inductor"), ("own", "aot_eager")])
def test_translations_equal_the_ordinary_ones(folders, kind, backend):
    pair = Pair(folders[kind], backend=backend, device=DEVICE, idle_bytes=None)
    for _ in range(2):  # captured, then replayed
        pair.check(ENGLISH[0], num_beams=3)
        pair.check(ENGLISH, num_beams=3)
        pair.check([*ENGLISH, " ".join(ENGLISH)], num_beams=3)
    for window in (5, None):
        pair.check(ENGLISH[:3], num_beams=3, window=window, **LONG)
    pair.check(ENGLISH, do_sample=True, num_return_sequences=3, seed=3)
    assert pair.num_compiled == 2
    compiled = pair.ours.compiled
    assert compiled.num_lent == 0
    if DEVICE == "cuda":
        captured = {id(buffers) for buffers in compiled.idle}
        pair.check(ENGLISH[1:], num_beams=3)
        assert {id(buffers) for buffers in compiled.idle} == captured


def test_streams_side_by_side(folders):
    pair = Pair(folders["marian"], backend="aot_eager", device=DEVICE, idle_bytes=None)
    expected = [pair.eager.translate(text) for text in ENGLISH[:2]]
    streams = [pair.ours.translate(text, stream=True) for text in ENGLISH[:2]]
    pieces = [[next(stream)] for stream in streams]
    for found, stream in zip(pieces[::-1], streams[::-1], strict=True):
        found += stream
    assert ["".join(found) for found in pieces] == expected


def test_weights_changed_in_place_and_replaced(folders):
    pair = Pair(folders["own"], backend="aot_eager", device=DEVICE, idle_bytes=None)
    before = pair.check(ENGLISH[:3])
    for translator in (pair.eager, pair.ours):
        with torch.no_grad():
            translator.network.decoder.layers[0].ffn.up_proj.weight.mul_(-1)
    changed = pair.check(ENGLISH[:3])
    assert [one.score for one in changed] != [one.score for one in before]
    for translator in (pair.eager, pair.ours):
        translator.network.double()
    pair.check(ENGLISH[:3])
    assert pair.num_compiled == 2


def test_moved_away_and_back(folders):
    pair = Pair(folders["marian"], backend="aot_eager", device=DEVICE, idle_bytes=None)
    before = pair.check(ENGLISH[:3])
    for place, dtype in (("cpu", torch.float64), (DEVICE, torch.float32)):
        for translator in (pair.eager, pair.ours):
            assert translator.to(place, dtype).device.type == torch.device(place).type
        assert pair.ours.compiled.idle == []
        found = pair.check(ENGLISH[:3])
    assert [one.text for one in found] == [one.text for one in before]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_types(folders, dtype):
    ours = Translator.from_pretrained(folders["marian"], device=DEVICE, dtype=dtype, compile=True)
    found = ours.translate(ENGLISH, num_beams=2, return_scores=True)
    assert all(np.isfinite(each.score) for each in found)
    assert ours.translate(ENGLISH, num_beams=2, return_scores=True) == found


@pytest.mark.parametrize("task", ["captioning", "question_answering"])
def test_captions_and_answers(tmp_path, task):
    folder = save_stock(tmp_path / task, task)
    pair = compiled_vlm.Pair(folder, backend="inductor", device=DEVICE, idle_bytes=None)
    images, questions = pictures(3), compiled_vlm.QUESTIONS
    for count in (3, 2, 3):
        asked = {"num_beams": 3, "min_new_tokens": 5}
        if task == "captioning":
            pair.check("caption", images[:count], **asked)
        else:
            pair.check("ask", images[:count], questions[:count], **asked)
    assert pair.num_compiled == 1
    assert pair.ours.compiled.num_lent == 0


def test_pictures(tmp_path):
    """Graphs for two sizes and numbers of pictures, replayed in turn; weights that change in place and adapters."""
    stable_diffusion().save_pretrained(tmp_path)
    pair = compiled_pictures.Pair(tmp_path, backend="inductor", device=DEVICE)
    height, width = (8 * side for side in pair.ours.size)
    pair.check(height=height, width=width)
    before = pair.num_compiled
    kinds = pair.ours.compiled._compiled
    assert before == len(kinds) == 3, list(kinds)  # the widths: "auto" has no measurements for heads of their sizes
    for _ in range(2):
        pair.check(seed=7, height=height, width=width)
        pair.check(compiled_pictures.PROMPTS[:2], height=2 * height, width=width)
    assert pair.num_compiled == before, list(kinds)
    assert pair.ours.compiled.num_graphs == 2
    for model in (pair.eager, pair.ours):
        with torch.no_grad():
            for attention in model.pipeline.unet.cross_attentions.values():
                attention.v_proj.weight.mul_(-3)
    pair.check(height=height, width=width)
    assert pair.num_compiled == before
    for model in (pair.eager, pair.ours):
        model.pipeline.unet.to(torch.float64).to(torch.float32)
    pair.check(height=height, width=width)


def test_pictures_in_half_types(tmp_path):
    stable_diffusion().save_pretrained(tmp_path)
    eager, ours = (TextToImage.from_pretrained(tmp_path, device=DEVICE, dtype=torch.float16) for _ in range(2))
    ours.compile()
    asked = {"num_inference_steps": 3, "progress": False}
    expected, found = (model.generate(compiled_pictures.PROMPTS, **asked) for model in (eager, ours))
    assert compiled_pictures.difference(expected, found) <= 8
