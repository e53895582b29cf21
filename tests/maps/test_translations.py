"""Maps of our translator: read once more, so that beams and lengths need no bookkeeping."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mmattn import Translator, record_attention
from mmattn.errors import UsageError
from mmattn.maps.recordings import RecordedPair
from tests.inference.tiny_translators import ENGLISH, save_own_translator, save_stock_translator

TEXTS = [ENGLISH[0], f"{ENGLISH[1]}\n{ENGLISH[2]}", ENGLISH[3]]
SETTINGS = {"max_new_tokens": 9, "min_new_tokens": 4}


@pytest.fixture(scope="module")
def translator(tmp_path_factory):
    folder = save_own_translator(tmp_path_factory.mktemp("own"), files=tmp_path_factory.mktemp("files"))
    return Translator.from_pretrained(folder, device="cpu")


@pytest.fixture(scope="module")
def nllb(tmp_path_factory):
    folder = save_stock_translator(tmp_path_factory.mktemp("nllb"), "nllb", files=tmp_path_factory.mktemp("files"))
    return Translator.from_pretrained(folder, device="cpu")


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3, "num_return_sequences": 2}], ids=["greedy", "beams"])
def test_translations_stay_and_weights_are_those_read_while_decoding(translator, settings):
    plain = translator.translate(TEXTS, **SETTINGS, **settings, return_alignment=True)
    with record_attention(translator) as maps:
        recorded = translator.translate(TEXTS, **SETTINGS, **settings)
    best = [one[0] if isinstance(one, list) else one for one in plain]
    texts = [one[0] if isinstance(one, list) else one for one in recorded]
    assert [one.text for one in best] == texts
    assert len(maps) == 4, "a line each"
    for number, expected in ((0, best[0]), (3, best[2])):
        alignment = maps.alignment(number)
        assert (alignment.source, alignment.target) == (expected.alignment.source, expected.alignment.target)
        assert np.allclose(alignment.weights, expected.alignment.weights, atol=2e-6)
        assert alignment.pairs() == expected.alignment.pairs()
    for text in maps.texts:
        assert isinstance(text, RecordedPair)
        for weights in text.weights.values():
            assert torch.allclose(weights.sum(-1), torch.ones(()), atol=1e-5)


def test_a_forced_language_and_named_heads(nllb):
    nllb.network.config.alignment_layer, nllb.network.config.alignment_heads = 0, [1]
    languages = {"src_lang": "eng_Latn", "tgt_lang": "deu_Latn"}
    plain = nllb.translate(TEXTS[0], **languages, **SETTINGS, return_alignment=True)
    with record_attention(nllb) as maps:
        assert nllb.translate(TEXTS[0], **languages, **SETTINGS) == plain.text
    assert maps.texts[0].best == (0, [1])
    assert maps.alignment().target == plain.alignment.target
    # The language is forced, and its place was read by nobody while decoding; words come after it.
    assert np.allclose(maps.alignment().weights, plain.alignment.weights, atol=2e-6)


def test_layers_heads_self_attention_and_drawing(translator, tmp_path):
    with record_attention(translator, layers=1, heads=[1]) as maps, record_attention(translator, role="self") as own:
        translator.translate(TEXTS[0], **SETTINGS)
    assert list(maps.texts[0].weights) == [1]
    assert maps.texts[0].weights[1].shape[0] == 1
    assert np.allclose(np.triu(own.array(), 1), 0)
    maps.alignment().save(tmp_path / "alignment.png")
    maps.save(tmp_path / "maps.npz")
    assert (tmp_path / "alignment.png").stat().st_size > 1000
    with pytest.raises(UsageError, match=r"heatmap\(\) is for pictures; of a translation, alignment\(\)"):
        maps.heatmap("a")
    with pytest.raises(UsageError, match="step= is for drawn pictures"):
        maps.array(step=0)


@pytest.mark.parametrize(
    ("call", "message"),
    [({"stream": True}, "a translation with stream= cannot be recorded"), ({"window": 5}, "with window= cannot be")],
)
def test_calls_that_cannot_be_recorded(translator, call, message):
    with record_attention(translator), pytest.raises(UsageError, match=message):
        translator.translate(TEXTS[0], **SETTINGS, **call)


def test_arguments_of_other_families_are_refused(translator):
    with pytest.raises(UsageError, match="steps means nothing for a Translator"), record_attention(translator, steps=1):
        pass
    message = r"layers has 9, and there are 2 with cross-attention, 0 to 1"
    for layers in (9, [0, 9]):
        with record_attention(translator, layers=layers), pytest.raises(UsageError, match=message):
            translator.translate(TEXTS[0], **SETTINGS)
    with record_attention(translator, heads=[0, 9]), pytest.raises(UsageError, match=r"heads=\[0, 9\], but there are"):
        translator.translate(TEXTS[0], **SETTINGS)
    with pytest.raises(UsageError, match=r"layers is \[\]; give"), record_attention(translator, layers=[]):
        pass
