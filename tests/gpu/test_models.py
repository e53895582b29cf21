"""Translator and vision-language model on a card: the same tokens as stock transformers in float32, and half types."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from mmattn.inference.translator import Translator
from mmattn.inference.vlm import VisionLanguageModel
from mmattn.maps import record_attention
from tests.gpu.card import DEVICE, MARKS
from tests.inference.tiny_models import STOCK, blip_processor, pictures, save_own, save_stock
from tests.inference.tiny_translators import ENGLISH, save_stock_translator, stock_translate

pytestmark = MARKS
QUESTIONS = ["what colour is the cat ?", "how many dogs ?", "is the red circle left of the square ?"]


@pytest.fixture(scope="module")
def marian(tmp_path_factory) -> Path:
    return save_stock_translator(tmp_path_factory.mktemp("marian"), "marian", files=tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def blip(tmp_path_factory) -> dict[str, Path]:
    return {task: save_stock(tmp_path_factory.mktemp(task), task) for task in STOCK}


@pytest.mark.parametrize(
    "generation", [{"num_beams": 1}, {"num_beams": 4}, {"num_beams": 3, "max_new_tokens": 7}], ids=str
)
def test_translations_equal_stock(marian, generation):
    ours = Translator.from_pretrained(marian, device=DEVICE, dtype=torch.float32)
    stock = AutoModelForSeq2SeqLM.from_pretrained(marian).to(DEVICE).eval()
    tokenizer = AutoTokenizer.from_pretrained(marian)
    expected = [stock_translate(stock, tokenizer, text, **generation)[0] for text in ENGLISH]
    assert ours.translate(ENGLISH, **generation) == expected
    assert len(set(expected)) == len(ENGLISH)
    assert ours.device.type == DEVICE


def test_encoded_sources_alignments_and_streams(marian):
    ours = Translator.from_pretrained(marian, device=DEVICE, dtype=torch.float32)
    expected = ours.translate(ENGLISH, num_beams=1)
    assert ours.translate(ours.encode(ENGLISH), num_beams=1) == expected
    assert "".join(ours.translate(ENGLISH[0], num_beams=1, stream=True)).strip() == expected[0]
    on_cpu = Translator.from_pretrained(marian, device="cpu", dtype=torch.float32)
    found, same = (each.translate(ENGLISH, return_alignment=True, return_scores=True) for each in (ours, on_cpu))
    assert [(each.text, each.alignment.pairs()) for each in found] == [
        (each.text, each.alignment.pairs()) for each in same
    ]
    assert [each.score for each in found] == pytest.approx([each.score for each in same], rel=1e-4)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16], ids=str)
def test_translations_in_half_types(marian, dtype):
    ours = Translator.from_pretrained(marian, device=DEVICE, dtype=dtype)
    weight = next(ours.network.parameters())
    if dtype is None and DEVICE == "cuda":
        assert weight.dtype is (torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16)
    found = ours.translate(ENGLISH, num_beams=2, return_scores=True)
    assert all(np.isfinite(each.score) for each in found)
    assert sum(bool(each.text) for each in found) == len(ENGLISH)


def test_captions_equal_stock(blip):
    ours = VisionLanguageModel.from_pretrained(blip["captioning"], device=DEVICE, dtype=torch.float32)
    stock = STOCK["captioning"].from_pretrained(blip["captioning"]).to(DEVICE).eval()
    processor, images = blip_processor(), pictures(3)
    bos = stock.config.text_config.bos_token_id
    for generation in ({"num_beams": 1}, {"num_beams": 3}):
        inputs = processor(images=images, return_tensors="pt").to(DEVICE)
        rows = stock.generate(**inputs, max_new_tokens=9, **generation)
        expected = [processor.decode(row[row != bos], skip_special_tokens=True) for row in rows]
        assert ours.caption(images, max_new_tokens=9, **generation) == expected
    assert len(set(expected)) > 1


def test_answers_and_matches_equal_those_on_a_cpu(blip):
    images = pictures(2)
    for task, call in (
        ("question_answering", lambda model: model.ask(images, [QUESTIONS] * 2, return_scores=True, max_new_tokens=7)),
        ("matching", lambda model: model.match(images, [["red cat", "a blue square"]] * 2, return_cosine=True)),
    ):
        found, same = (
            np.array(call(VisionLanguageModel.from_pretrained(blip[task], device=device, dtype=torch.float32)))
            for device in (DEVICE, "cpu")
        )
        if task == "question_answering":
            assert found[..., 0].tolist() == same[..., 0].tolist()
            found, same = found[..., 1].astype(float), same[..., 1].astype(float)
        np.testing.assert_allclose(found, same, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [None, torch.float16], ids=str)
def test_half_types_and_maps(tmp_path, dtype):
    model = VisionLanguageModel.from_pretrained(save_own(tmp_path), device=DEVICE, dtype=dtype)
    encoded = model.encode(pictures(3))
    plain = model.ask(encoded, [QUESTIONS] * 3, num_beams=2)
    with record_attention(model) as maps:
        assert model.ask(encoded, [QUESTIONS] * 3, num_beams=2) == plain
    assert len(maps) == 9
    np.testing.assert_allclose(maps.array(0).sum(-1), 1, atol=1e-2)
