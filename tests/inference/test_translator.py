"""The translation façade: equal to stock `generate` on a Marian folder, in any shape in which texts are given."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, MarianConfig, MarianMTModel

from mmattn.data.translation_tokenizer import train_marian_tokenizer
from mmattn.errors import CheckpointError, UsageError
from mmattn.inference.translator import Translator

TEXTS = ["a red ring", "the blue square is small and the red ring is large", "a ring", "the small red square"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("marian")
    tokenizer = train_marian_tokenizer(TEXTS, "word", 100)
    size = len(tokenizer.get_vocab())
    torch.manual_seed(0)
    config = MarianConfig(
        vocab_size=size,
        d_model=24,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=3,
        decoder_attention_heads=3,
        encoder_ffn_dim=37,
        decoder_ffn_dim=37,
        max_position_embeddings=19,
        activation_function="swish",
        scale_embedding=True,
        pad_token_id=size - 1,
        eos_token_id=0,
        decoder_start_token_id=size - 1,
        init_std=0.5,
    )
    model = MarianMTModel(config).eval()
    model.final_logits_bias[0, 0] = 2.0
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def stock(folder: Path, text: str, **arguments: object) -> str:
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    out = model.generate(**tokenizer(text, return_tensors="pt"), **{"max_length": 19, "num_beams": 1, **arguments})
    return tokenizer.decode(out[0], skip_special_tokens=True).strip()


@pytest.mark.parametrize("arguments", [{}, {"num_beams": 4, "length_penalty": 0.6}])
def test_equals_stock_text_by_text(folder, arguments):
    translator = Translator.from_pretrained(folder, device="cpu")
    expected = [stock(folder, text, **arguments) for text in TEXTS]
    assert len(set(expected)) > 1
    for batch_tokens in (1, 11, None):
        assert translator.translate(TEXTS, batch_tokens=batch_tokens, max_length=19, **arguments) == expected
    assert translator.translate(TEXTS[1], max_length=19, **arguments) == expected[1]
    assert translator.translate(translator.encode(TEXTS), max_length=19, **arguments) == expected
    assert translator.peak_memory is not None


def test_lines_blanks_and_streams(folder):
    translator = Translator.from_pretrained(folder, device="cpu")
    first, second = translator.translate(TEXTS[:2])
    document = f"{TEXTS[0]}\n\n{TEXTS[1]}"
    assert translator.translate(document) == f"{first}\n\n{second}"
    assert translator.translate(["", " "]) == ["", ""]
    assert "".join(translator.translate(document, stream=True)) == f"{first}\n\n{second}"
    with pytest.raises(UsageError, match="use num_beams=1"):
        translator.translate(document, stream=True, num_beams=2)


def test_scores_and_alignment(folder):
    translator = Translator.from_pretrained(folder, device="cpu")
    found = translator.translate(TEXTS[1], num_beams=3, return_scores=True, return_alignment=True)
    assert found.score < 0
    assert found.alignment.source == TEXTS[1].split()
    assert found.alignment.weights.shape == (len(found.alignment.target), len(found.alignment.source))
    assert 0 < found.alignment.weights.sum(axis=1).max() <= 1 + 1e-5


def test_long_lines_are_split_or_refused(folder):
    translator = Translator.from_pretrained(folder, device="cpu")
    sentences = [f"{TEXTS[1]} ." for _ in range(3)]
    parts = translator.translate(sentences)
    assert translator.translate(" ".join(sentences)) == " ".join(parts)
    with pytest.raises(UsageError, match=r"text 1 has 37 tokens, this model takes 19"):
        translator.translate(" ".join(sentences), on_long="error")
    with pytest.raises(UsageError, match="holds a sentence of"):
        translator.translate(" ".join(TEXTS * 3))


def test_int8_and_saving(folder, tmp_path):
    translator = Translator.from_pretrained(folder, device="cpu")
    translator.save_pretrained(tmp_path)
    assert stock(tmp_path, TEXTS[1]) == stock(folder, TEXTS[1])
    quantised = Translator.from_pretrained(folder, device="cpu", quantize="int8")
    assert isinstance(quantised.translate(TEXTS[0]), str)
    with pytest.raises(UsageError, match="is quantised"):
        quantised.save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="quantize='int4' is unknown"):
        Translator.from_pretrained(folder, quantize="int4")


def test_wrong_arguments(folder, tmp_path):
    translator = Translator.from_pretrained(folder, device="cpu")
    with pytest.raises(UsageError, match="one pair of languages"):
        translator.translate("a ring", tgt_lang="de")
    with pytest.raises(UsageError, match="knows its source language"):
        translator.translate("a ring", src_lang="en")
    with pytest.raises(UsageError, match="unknown generation argument 'beams'"):
        translator.translate("a ring", beams=3)
    with pytest.raises(UsageError, match=r"text 2 of 2 is a int"):
        translator.translate(["a ring", 3])
    other = train_marian_tokenizer([*TEXTS, "one more word"], "word", 100)
    with pytest.raises(CheckpointError, match="they are not of one model"):
        Translator(translator.network, other)
