"""Compiled steps: the translations of the ordinary path, whatever is asked for, and no second compilation."""

from __future__ import annotations

import copy
import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from mmattn.errors import RunError, UsageError
from mmattn.inference.linear import use_fast_products
from mmattn.inference.traced_products import trace_products
from mmattn.inference.translator import Translator
from mmattn.models.static_decoding import StaticState, StepBuffers, StepShape
from mmattn.models.translator import CompiledDecoder
from mmattn.ops.observe import observing
from mmattn.ops.registry import use_backend
from tests.inference.tiny_translators import ENGLISH, LANGUAGES, save_own_translator, save_stock_translator

POSITIONS = 150  # beyond two buckets of the cache
LONG = {"min_new_tokens": 140, "max_new_tokens": 140, "no_repeat_ngram_size": 0}
SHORTER = {"min_new_tokens": 70, "max_new_tokens": 70}
LANGUAGES = LANGUAGES | {"own": {}, "learned": {}}


@pytest.fixture(autouse=True)
def no_recompilation():
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    def new(name: str) -> Path:
        return tmp_path_factory.mktemp(name)

    sizes = {"max_position_embeddings": POSITIONS}
    return {
        "marian": save_stock_translator(new("marian"), "marian", files=new("files"), **sizes),
        "m2m100": save_stock_translator(new("m2m100"), "m2m100", files=new("files"), **sizes),
        "own": save_own_translator(new("own"), files=new("files"), max_positions=POSITIONS),
        "one layer": save_own_translator(
            new("one-layer"), files=new("files"), max_positions=POSITIONS, decoder_layers=1
        ),
        "learned": save_own_translator(
            new("learned"), files=new("files"), max_positions=POSITIONS, positions="learned", norm_first=False
        ),
    }


class Pair:
    """A translator in both ways, with what was compiled."""

    def __init__(
        self, folder: Path, *, backend: str = "eager", device: str = "cpu", idle_bytes: int | None = 2**24
    ) -> None:
        self.eager = Translator.from_pretrained(folder, device=device, dtype="float32")
        self.ours = Translator.from_pretrained(folder, device=device, dtype="float32", compile=True)
        self.counter = CompileCounterWithBackend(backend)
        self.ours.compiled = CompiledDecoder(self.ours.network, backend=self.counter, idle_bytes=idle_bytes)

    @property
    def num_compiled(self) -> int:
        return self.counter.frame_count

    def check(self, texts: Any, **arguments: Any) -> list[Any]:
        """Both translations must be equal; returns ours."""
        generators = [None, None]
        if "seed" in arguments:
            seed = arguments.pop("seed")
            generators = [torch.Generator(self.ours.device).manual_seed(seed) for _ in range(2)]
        asked = {"return_scores": True, "return_alignment": True} | arguments
        expected, ours = (
            translator.translate(texts, generator=generator, **asked)
            for translator, generator in zip((self.eager, self.ours), generators, strict=True)
        )
        for one, other in zip(flat(expected), flat(ours), strict=True):
            assert other.text == one.text
            assert (one.score is None) == (other.score is None)
            assert one.score is None or other.score == pytest.approx(one.score, rel=1e-4, abs=1e-4)
            if one.alignment is not None:
                np.testing.assert_allclose(other.alignment.weights, one.alignment.weights, atol=1e-4)
        return ours


def flat(found: Any) -> list[Any]:
    if isinstance(found, list):
        return [one for each in found for one in flat(each)]
    return [found]


@pytest.fixture(scope="module")
def pairs(folders) -> dict[str, Pair]:
    return {kind: Pair(folder) for kind, folder in folders.items()}


@pytest.mark.parametrize(
    ("kind", "num_beams"), [("marian", 1), ("marian", 3), ("m2m100", 1), ("own", 3), ("learned", 1)]
)
def test_translations_equal_over_lengths_and_numbers_of_texts(pairs, kind, num_beams):
    """Batches of 2 to 16 rows, sources of two buckets, targets of three, in one compilation."""
    pair, asked = pairs[kind], LANGUAGES[kind] | {"num_beams": num_beams}
    before = pair.num_compiled
    pair.check(ENGLISH, max_new_tokens=17, **asked)
    assert pair.num_compiled == before + 1
    pair.check(ENGLISH[:2], **asked)
    pair.check([" ".join(ENGLISH[:2]), *ENGLISH * 2], **asked)
    pair.check(ENGLISH[:3], **asked, **LONG)
    assert pair.num_compiled == before + 1


@pytest.mark.parametrize(("kind", "num_beams"), [("marian", 1), ("own", 3)])
def test_single_texts_are_compiled_once_more(pairs, kind, num_beams):
    pair, asked = pairs[kind], LANGUAGES[kind] | {"num_beams": num_beams}
    pair.check(ENGLISH[:2], **asked)
    before = pair.num_compiled
    pair.check(ENGLISH[0], max_new_tokens=3, **asked)
    pair.check([*ENGLISH, " ".join(ENGLISH)], batch_tokens=40, **asked)
    pair.check(" ".join(ENGLISH), **asked, **LONG | SHORTER)
    assert pair.num_compiled == before + 1


@pytest.mark.parametrize("window", [1, 5, 70, POSITIONS])
@pytest.mark.parametrize(("kind", "num_beams"), [("marian", 1), ("own", 3)])
def test_windows(pairs, kind, num_beams, window):
    """The ring of places turns once it is full; beams are reordered in it."""
    pair = pairs[kind]
    ours = pair.check(ENGLISH[:3], num_beams=num_beams, window=window, **LONG)
    if window == 5:
        whole = pair.check(ENGLISH[:3], num_beams=num_beams, **LONG)
        assert [one.text for one in ours] != [one.text for one in whole]


@pytest.mark.parametrize(
    "arguments",
    [
        {"do_sample": True, "seed": 3},
        {"do_sample": True, "seed": 4, "num_return_sequences": 3, "temperature": 1.3, "top_k": 7},
        {"do_sample": True, "seed": 5, "num_beams": 3, "num_return_sequences": 2},
        {"num_beams": 3, "num_return_sequences": 3, "length_penalty": 2.0},
        {"num_beams": 3, "early_stopping": True},
        {"num_beams": 3, "early_stopping": "never", "no_repeat_ngram_size": 1},
        {"repetition_penalty": 1.7, "bad_words_ids": [[5], [7, 9]], "min_length": 9},
        {"forced_eos_token_id": 0, "max_new_tokens": 11, "num_beams": 3},
        {"return_alignment": False},
    ],
    ids=str,
)
def test_every_way_of_decoding(pairs, arguments):
    found = pairs["marian"].check(ENGLISH, **arguments)
    assert len(flat(found)) == len(ENGLISH) * arguments.get("num_return_sequences", 1)


def test_plain_texts_languages_and_encoded_sources(pairs):
    for kind in ("marian", "m2m100"):
        eager, ours = pairs[kind].eager, pairs[kind].ours
        assert ours.translate(ENGLISH, **LANGUAGES[kind]) == eager.translate(ENGLISH, **LANGUAGES[kind])
    source = ours.encode(ENGLISH, src_lang="en")
    for code in ("de", "fr"):
        assert ours.translate(source, tgt_lang=code) == eager.translate(ENGLISH, src_lang="en", tgt_lang=code)
    assert ours.translate(["", "\n"], **LANGUAGES["m2m100"]) == ["", "\n"]


def test_streams_side_by_side(pairs):
    """Each has buffers of its own, and gives them back, also when nobody reads it to its end."""
    pair = pairs["marian"]
    eager, ours, compiled = pair.eager, pair.ours, pair.ours.compiled
    expected = [eager.translate(text) for text in ENGLISH[:2]]
    before = compiled.num_lent
    streams = [ours.translate(text, stream=True) for text in ENGLISH[:2]]
    pieces = [[next(stream)] for stream in streams]
    assert compiled.num_lent == before + 2
    pieces[1] += streams[1]
    pieces[0] += streams[0]
    assert ["".join(each) for each in pieces] == expected
    unread = ours.translate(ENGLISH[0], stream=True)
    next(unread)
    del unread, streams
    gc.collect()
    assert compiled.num_lent == before


def test_buffers_are_used_again(pairs, monkeypatch):
    """What an earlier text left in them does not show, and no more are kept than allowed."""
    pair = pairs["marian"]
    compiled = pair.ours.compiled
    compiled.idle.clear()
    pair.check(ENGLISH, max_new_tokens=60, min_new_tokens=60)
    held = [*compiled.idle]
    pair.check(ENGLISH[:5])
    assert compiled.idle == held
    assert len(held) == 1
    monkeypatch.setattr(compiled, "_idle_bytes", held[0].nbytes - 1)
    pair.check(ENGLISH)
    assert compiled.idle == []
    lend, lent = compiled.lend, []

    def watched(shape: StepShape) -> StepBuffers:
        buffers = lend(shape)
        lent.append(weakref.ref(buffers))
        return buffers

    monkeypatch.setattr(compiled, "lend", watched)
    gc.disable()
    try:
        pair.ours.translate(ENGLISH, return_alignment=True, **LONG)
        assert [reference() for reference in lent] == [None] * 3
    finally:
        gc.enable()


def test_weights_changed_in_place_and_replaced(folders):
    pair = Pair(folders["own"])
    before = pair.check(ENGLISH[:3])
    for translator in (pair.eager, pair.ours):
        with torch.no_grad():
            translator.network.decoder.layers[0].ffn.up_proj.weight.mul_(-1)
    changed = pair.check(ENGLISH[:3])
    assert pair.num_compiled == 1
    assert [one.score for one in changed] != [one.score for one in before]
    for translator in (pair.eager, pair.ours):
        translator.network.double()
    exact = pair.check(ENGLISH[:3])
    assert pair.num_compiled == 2
    assert [one.score for one in exact] == pytest.approx([one.score for one in changed], rel=1e-5)


def test_fast_products_stay_in_what_is_compiled():
    layers = nn.Sequential(nn.Linear(53, 97), nn.SiLU(), nn.Linear(97, 31, bias=False)).eval()
    plain = copy.deepcopy(layers)
    use_fast_products(layers)
    trace_products(layers)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layers, backend=counter, fullgraph=True, dynamic=True)
    with torch.inference_mode():
        for rows in (5, 3, 67):
            x = torch.randn(rows, 53)
            torch.testing.assert_close(compiled(x), plain(x))
            torch.testing.assert_close(layers(x), plain(x))
    with torch.no_grad():
        for each in (layers, plain):
            each[0].weight.neg_()
    with torch.inference_mode():
        torch.testing.assert_close(compiled(x), plain(x))
    assert counter.frame_count == 1
    called = [str(node.target) for node in counter.graphs[0].graph.nodes if node.op == "call_function"]
    products = [name for name in called if "product" in name or "linear" in name or "mm." in name]
    assert products == ["mmattn.fast_product.default"] * 2


def test_a_chosen_backend_is_compiled_in(pairs):
    pair = pairs["own"]
    pair.check(ENGLISH, num_beams=3)
    before = pair.num_compiled
    for _ in range(2):
        with use_backend("eager", role="self"):
            pair.check(ENGLISH, num_beams=3)
    pair.check(ENGLISH, num_beams=3)
    assert pair.num_compiled == before + 1


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "kind"), [("aot_eager", "own"), ("inductor", "one layer")])
def test_compiled_further(folders, backend, kind):
    """Of a second layer inductor, which is the slowest, would make the same again."""
    pair = Pair(folders[kind], backend=backend)
    for texts in (ENGLISH[:2], ENGLISH, [*ENGLISH, " ".join(ENGLISH)]):
        pair.check(texts, num_beams=3)
    pair.check(ENGLISH[:3], num_beams=3, **LONG)
    assert pair.num_compiled == 1


def test_what_is_refused(folders, pairs):
    with pytest.raises(UsageError, match="compile=True does not go with quantize='int8': leave one of them out"):
        Translator.from_pretrained(folders["marian"], device="cpu", quantize="int8", compile=True)
    ours = pairs["marian"].ours
    message = "does not go with autocast: open the model with dtype= instead"
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(UsageError, match=message):
        ours.translate(ENGLISH)
    with observing(print), pytest.raises(UsageError, match="recorded or steered in compiled steps: open the model"):
        ours.translate(ENGLISH)
    with pytest.raises(UsageError, match="window is 0, it must be at least 1"):
        ours.translate(ENGLISH, window=0)
    with pytest.raises(UsageError, match="max_length 152 is more than this model's 150 positions"):
        ours.translate(ENGLISH, max_new_tokens=151)
    with torch.device("meta"):
        network = type(ours.network)(ours.network.config)
    with pytest.raises(UsageError, match="compile=True works on cpu and cuda, the network is on meta: leave it out"):
        CompiledDecoder(network)


def test_a_machine_that_cannot_compile(pairs):
    def backend(*_: Any) -> Any:
        raise ValueError("no compiler here\nand more lines")

    ours = Translator(pairs["own"].ours.network, pairs["own"].ours.tokenizer)
    ours.compiled = CompiledDecoder(ours.network, backend=backend)
    with pytest.raises(RunError, match=r"compile=True: the step cannot be compiled here: .*; leave compile out$"):
        ours.translate(ENGLISH)
    ours.compiled = None
    assert ours.translate(ENGLISH) == pairs["own"].eager.translate(ENGLISH)


def test_a_state_used_beyond_what_it_was_started_for(pairs):
    ours = pairs["own"].ours
    contexts = ours.encode(ENGLISH[:2]).batches[0].contexts
    state = ours.compiled.start(contexts, most_rows=3, max_length=5, reads_alignment=True)
    with pytest.raises(UsageError, match="input_ids has 3 rows, this state has 2 .2 contexts with 1 rows each."):
        state.logits(torch.zeros(3, 1, dtype=torch.int64))
    state.logits(torch.zeros(2, 2, dtype=torch.int64))
    with pytest.raises(UsageError, match="4 rows per context were asked for, this state was started for 3"):
        state.reorder(torch.arange(2).repeat_interleave(4))
    with pytest.raises(UsageError, match="2 tokens are read and 4 more asked for, max_length is 5"):
        state.logits(torch.zeros(2, 4, dtype=torch.int64))
    assert (state.length, state.num_rows) == (2, 2)


def test_memory_is_rounded_up_to_buckets(pairs):
    ours = pairs["marian"].ours
    length = len(ours.tokenizer(ENGLISH[0]).input_ids)
    assert 32 < length < 64
    ours.translate([ENGLISH[0]] * 3, num_beams=3, return_alignment=True, **LONG | SHORTER)
    exact = ours.cache_bytes(length, 1, batch_size=3).context
    padded = ours.cache_bytes(64, 128, batch_size=4, num_beams=3)
    assert ours.peak_memory.context == exact + padded.context + 4 * 64  # the mask
    assert ours.peak_memory.cache == padded.cache


@pytest.mark.parametrize("num_beams", [1, 3])
def test_looking_for_finished_texts_now_and_then_changes_nothing(pairs, num_beams, monkeypatch):
    """As on a card. Texts end at different steps."""
    pair = pairs["marian"]
    expected = pair.check(ENGLISH, num_beams=num_beams)
    assert len({len(one.text) for one in expected}) > 1
    step, taken, counts = StaticState._step, [], []

    def counted(self: StaticState, tokens: torch.Tensor) -> Any:
        taken.append(len(tokens))
        return step(self, tokens)

    monkeypatch.setattr(StaticState, "_step", counted)
    for every in (1, 7, 1000):
        taken.clear()
        monkeypatch.setattr("mmattn.models.static_decoding.STOP_EVERY", {"cpu": every})
        assert [one.text for one in pair.check(ENGLISH, num_beams=num_beams)] == [one.text for one in expected]
        counts.append(len(taken))
    assert counts[0] <= counts[1] < counts[2] == POSITIONS - 1
