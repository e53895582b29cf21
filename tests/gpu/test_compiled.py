"""Compiled steps on a card: one compilation, CUDA graphs replayed, the translations of the ordinary path."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mmattn.inference.translator import Translator
from tests.gpu.card import DEVICE, MARKS
from tests.inference.test_compiled import LONG, POSITIONS, Pair
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_types(folders, dtype):
    ours = Translator.from_pretrained(folders["marian"], device=DEVICE, dtype=dtype, compile=True)
    found = ours.translate(ENGLISH, num_beams=2, return_scores=True)
    assert all(np.isfinite(each.score) for each in found)
    assert ours.translate(ENGLISH, num_beams=2, return_scores=True) == found
