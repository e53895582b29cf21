"""The translation façade: equal to stock transformers text by text, in whatever shape texts are given."""

from __future__ import annotations

import pickle
import shutil
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from mmattn.errors import CheckpointError, UsageError
from mmattn.inference.translator import Translator
from tests.inference.tiny_translators import (
    ENGLISH,
    KINDS,
    LANGUAGES,
    POSITIONS,
    set_generation,
    stock_translate,
)


@dataclass
class Pair:
    """A folder opened by us and by transformers."""

    ours: Translator
    model: Any
    tokenizer: Any
    languages: dict[str, Any]

    def stock(self, text: str, **arguments: Any) -> list[str]:
        if "src_lang" in self.languages:
            tokenizer = self.tokenizer
            target = self.languages["tgt_lang"]
            token = tokenizer.get_lang_id(target) if hasattr(tokenizer, "get_lang_id") else None
            forced = tokenizer.convert_tokens_to_ids(target) if token is None else token
            return stock_translate(self.model, tokenizer, text, **{"forced_bos_token_id": forced, **arguments})
        tag = f">>{self.languages['tgt_lang']}<< " if self.languages else ""
        return stock_translate(self.model, self.tokenizer, tag + text, **arguments)

    def translate(self, texts: Any, **arguments: Any) -> Any:
        return self.ours.translate(texts, **{**self.languages, **arguments})


@pytest.fixture(scope="module")
def pairs(translators, translator_folders):
    return {
        kind: Pair(
            translators[kind],
            AutoModelForSeq2SeqLM.from_pretrained(translator_folders[kind]).eval(),
            AutoTokenizer.from_pretrained(translator_folders[kind]),
            LANGUAGES[kind],
        )
        for kind in KINDS
    }


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"num_beams": 4},
        {"num_beams": 4, "length_penalty": 0.4, "early_stopping": True, "max_length": 31},
        {"min_new_tokens": 7, "max_new_tokens": 19, "no_repeat_ngram_size": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_stock_text_by_text(pairs, kind, arguments):
    pair = pairs[kind]
    expected = [pair.stock(text, **arguments)[0] for text in ENGLISH]
    assert pair.translate(ENGLISH, **arguments) == expected
    assert pair.translate(ENGLISH[1], **arguments) == expected[1]
    assert len(set(expected)) == len(ENGLISH), "equal texts would hide a wrong order"


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("kind", ["marian", "nllb"])
def test_start_and_ends_are_those_of_the_generation_settings(translator_folders, tmp_path, kind, num_beams):
    """Stock takes them from generation_config.json, whatever config.json says; saved, they stay."""
    folder = shutil.copytree(translator_folders[kind], tmp_path / "stock")
    set_generation(folder, decoder_start_token_id=6, eos_token_id=[2, 0, 15, 17], min_length=9, min_new_tokens=0)
    stock, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ours = Translator.from_pretrained(folder)
    ours.save_pretrained(tmp_path / "saved")
    languages = LANGUAGES[kind]
    first = {"forced_bos_token_id": ours.codes.target_token("deu_Latn")} if languages else {}
    tokenizer.src_lang = languages.get("src_lang", None)
    inputs = tokenizer(ENGLISH[0], return_tensors="pt")
    row = stock.generate(**inputs, num_beams=num_beams, max_length=POSITIONS, **first)[0, 1:]
    expected = tokenizer.decode(row, skip_special_tokens=True).strip()
    for model in (ours, Translator.from_pretrained(tmp_path / "saved")):
        assert model.translate(ENGLISH[0], num_beams=num_beams, **languages) == expected


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("length", [{"max_new_tokens": 1}, {"max_length": 2}, {"max_new_tokens": 2}])
def test_a_forced_end_comes_before_the_language(translator_folders, translators, num_beams, length):
    stock = AutoModelForSeq2SeqLM.from_pretrained(translator_folders["nllb"])
    ours, end = translators["nllb"], 17
    inputs = ours.tokenizer(ENGLISH[0], return_tensors="pt")
    first = {"forced_bos_token_id": ours.codes.target_token("deu_Latn"), "forced_eos_token_id": end}
    row = stock.generate(**inputs, num_beams=num_beams, **{"max_length": None, **length}, **first)[0, 1:]
    expected = ours.tokenizer.decode(row, skip_special_tokens=True).strip()
    assert expected
    given = {"num_beams": num_beams, "forced_eos_token_id": end, **length}
    assert ours.translate(ENGLISH[0], tgt_lang="deu_Latn", **given) == expected


@pytest.mark.parametrize("dtype", ["int8", torch.int64, "nothing", 5])
def test_weights_are_floats(translator_folders, dtype):
    with pytest.raises(UsageError, match="is unknown: use float32, float16, bfloat16 or auto"):
        Translator.from_pretrained(translator_folders["marian"], dtype=dtype)


def test_a_start_outside_the_vocabulary_is_named(translator_folders, tmp_path):
    folder = shutil.copytree(translator_folders["marian"], tmp_path / "stock")
    set_generation(folder, decoder_start_token_id=[6])
    with pytest.raises(CheckpointError, match="generation_config.json: decoder_start_token_id is .6.: tokens of the"):
        Translator.from_pretrained(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_several_sequences_are_stocks(pairs, kind):
    pair, arguments = pairs[kind], {"num_beams": 4, "num_return_sequences": 3, "max_new_tokens": 13}
    expected = [pair.stock(text, **arguments) for text in ENGLISH[:3]]
    assert pair.translate(ENGLISH[:3], **arguments) == expected
    assert pair.translate(ENGLISH[2], **arguments) == expected[2]


@pytest.mark.parametrize("num_beams", [1, 3])
def test_draws_after_a_forced_language_are_stocks(pairs, num_beams):
    """Transformers draws the language's token too, though it has no choice."""
    pair, arguments = pairs["nllb"], {"do_sample": True, "num_beams": num_beams, "max_new_tokens": 11}
    for seed, text in enumerate(ENGLISH[:3]):
        torch.manual_seed(seed)
        expected = pair.stock(text, **arguments)[0]
        torch.manual_seed(seed)
        assert pair.translate(text, **arguments) == expected


@pytest.mark.parametrize("num_beams", [1, 3])
def test_many_texts_in_any_batches_come_back_in_their_order(pairs, num_beams):
    pair = pairs["marian"]
    texts = [" ".join(ENGLISH[(i + j) % 5] for j in range(i % 3 + 1)) for i in range(23)]
    one_by_one = [pair.translate(text, num_beams=num_beams, max_new_tokens=17) for text in texts]
    assert len(set(one_by_one)) > 10
    for batch_tokens in (1, 37, 200, 100_000, None):
        found = pair.translate(texts, num_beams=num_beams, max_new_tokens=17, batch_tokens=batch_tokens)
        assert found == one_by_one
    assert pair.translate(tuple(texts[:3]), num_beams=num_beams, max_new_tokens=17) == one_by_one[:3]
    assert pair.translate((text for text in texts[:2]), num_beams=num_beams, max_new_tokens=17) == one_by_one[:2]


def test_shapes_of_results(pairs):
    pair = pairs["marian"]
    assert isinstance(pair.translate(ENGLISH[0]), str)
    assert [type(text) for text in pair.translate(ENGLISH[:1])] == [str]
    assert pair.translate([]) == []
    sampled = pair.translate(ENGLISH[:2], do_sample=True, num_return_sequences=3, max_new_tokens=7)
    assert [len(texts) for texts in sampled] == [3, 3]


def test_lines_stay_lines_and_blank_ones_blank(pairs):
    pair = pairs["nllb"]
    first, second = pair.translate(ENGLISH[:2])
    assert pair.translate(f"{ENGLISH[0]}\n{ENGLISH[1]}") == f"{first}\n{second}"
    assert pair.translate(f"\n{ENGLISH[0]}\n\n  \n{ENGLISH[1]}\n") == f"\n{first}\n\n\n{second}\n"
    assert pair.translate(["", ENGLISH[1], " \t", "\n\n"]) == ["", second, "", "\n\n"]
    assert pair.translate("") == ""
    assert pair.translate("", num_beams=2, num_return_sequences=2) == ["", ""]
    assert pair.translate(f"{ENGLISH[0]}\n{ENGLISH[1]}", num_beams=2, num_return_sequences=2) == [
        "\n".join(lines)
        for lines in zip(*pair.translate(ENGLISH[:2], num_beams=2, num_return_sequences=2), strict=True)
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_long_lines_are_cut_at_sentence_ends(pairs, kind):
    pair = pairs[kind]
    line = " ".join(ENGLISH)
    ids = pair.ours.codes.source_ids([line], None, None)[0]
    assert len(ids) > POSITIONS
    found = pair.translate(line)
    plan = pair.ours.encode(line, **pair.languages).plan
    parts = [segment.text for segment in plan.segments]
    assert " ".join(parts) == line
    assert 1 < len(parts) < len(ENGLISH), "as few parts as fit"
    assert max(len(segment.ids) for segment in plan.segments) <= POSITIONS
    assert found == " ".join(pair.translate(parts))


def test_long_lines_that_cannot_be_cut_are_refused(pairs):
    pair = pairs["marian"]
    line, count = " ".join(ENGLISH), len(pair.tokenizer(" ".join(ENGLISH)).input_ids)
    with pytest.raises(UsageError, match=rf"text 2 has {count} tokens, this model takes 53: shorten it, or let it be"):
        pair.translate([ENGLISH[0], line], on_long="error")
    with pytest.raises(UsageError, match=rf"text 1, line 3 has {count} tokens"):
        pair.translate(f"{ENGLISH[0]}\n\n{line}", on_long="error")
    sentence = "cat " * 60
    with pytest.raises(UsageError, match=r"text 1 holds a sentence of \d+ tokens, this model takes 53: cut it \('cat"):
        pair.translate(f"{ENGLISH[0]} {sentence}")
    with pytest.raises(UsageError, match="on_long='cut' is unknown: use 'split' or 'error'"):
        pair.translate("a cat", on_long="cut")
    assert pair.translate(ENGLISH[0], on_long="error") == pair.translate(ENGLISH[0])


@pytest.mark.parametrize("kind", KINDS)
def test_encoded_once_translated_often(pairs, kind, monkeypatch):
    pair = pairs[kind]
    network, calls = pair.ours.network, []
    encode, project = network.encode, network.project_context
    monkeypatch.setattr(network, "encode", lambda *a: calls.append("encode") or encode(*a))
    monkeypatch.setattr(network, "project_context", lambda *a: calls.append("project") or project(*a))
    greedy, beams = pair.translate(ENGLISH), pair.translate(ENGLISH, num_beams=4)
    assert calls == ["encode", "project"] * 2, "once for all beams"
    encoded = pair.ours.encode([*ENGLISH, ""], **pair.languages, batch_tokens=40)
    assert len(encoded) == 6
    calls.clear()
    assert pair.ours.translate(encoded) == [*greedy, ""]
    assert pair.ours.translate(encoded, num_beams=4) == [*beams, ""]
    assert calls == []
    with pytest.raises(UsageError, match="src_lang, on_long and batch_tokens belong to encode"):
        pair.ours.translate(encoded, batch_tokens=3)
    with pytest.raises(UsageError, match="src_lang, on_long and batch_tokens belong to encode"):
        pair.ours.translate(encoded, on_long="error")


def test_sources_of_another_model_are_refused(pairs, translator_folders):
    source = pairs["marian"].ours.encode(ENGLISH[:2])
    again = Translator.from_pretrained(translator_folders["marian"])
    assert again.translate(source) == pairs["marian"].translate(ENGLISH[:2])
    other = Translator(again.network.__class__(again.network.config).eval(), again.tokenizer)
    with pytest.raises(UsageError, match="these sources were encoded by another model: encode them with this one"):
        other.translate(source)
    stored = pickle.loads(pickle.dumps(source))  # for another process, whose models are other ones
    assert other.translate(stored)


def test_encoded_sources_say_what_they_hold(pairs):
    pair = pairs["marian"]
    encoded = pair.ours.encode(ENGLISH[0])
    length = len(pair.tokenizer(ENGLISH[0]).input_ids)
    assert encoded.nbytes == 3 * 2 * length * 30 * 4  # layers, keys and values, tokens, channels, bytes
    assert pair.ours.translate(encoded) == pair.translate(ENGLISH[0]), "one text, so a str"


def test_the_target_language_of_encoded_sources_can_be_said_later(pairs):
    pair = pairs["nllb"]
    into = {code: pair.translate(ENGLISH, tgt_lang=code) for code in ("deu_Latn", "fra_Latn")}
    assert into["deu_Latn"] != into["fra_Latn"]
    encoded = pair.ours.encode(ENGLISH, src_lang="eng_Latn")
    for code, expected in into.items():
        assert pair.ours.translate(encoded, tgt_lang=code) == expected
    mixed = ["deu_Latn", "fra_Latn", "fra_Latn", "deu_Latn", "fra_Latn"]
    expected = [into[code][number] for number, code in enumerate(mixed)]
    assert pair.ours.translate(encoded, tgt_lang=mixed) == expected
    assert pair.translate(ENGLISH, tgt_lang=mixed) == expected
    assert pair.translate(ENGLISH, tgt_lang=mixed, num_beams=3, batch_tokens=30) == [
        pair.translate(text, tgt_lang=code, num_beams=3) for text, code in zip(ENGLISH, mixed, strict=True)
    ]
    with pytest.raises(UsageError, match="this model translates into 3 languages: give tgt_lang, such as deu_Latn"):
        pair.ours.translate(encoded)
    with pytest.raises(UsageError, match="tgt_lang='deu' is no language of this model; nearest: deu_Latn"):
        pair.ours.translate(encoded, tgt_lang="deu")
    with pytest.raises(UsageError, match="2 tgt_lang for 5 texts"):
        pair.ours.translate(encoded, tgt_lang=["deu_Latn", "fra_Latn"])
    tagged = pairs["tags"].ours.encode(ENGLISH, tgt_lang="deu")
    with pytest.raises(UsageError, match="tgt_lang belongs to encode"):
        pairs["tags"].ours.translate(tagged, tgt_lang="fra")


def test_languages_of_the_sources_may_differ(pairs):
    pair = pairs["m2m100"]
    texts, languages = [ENGLISH[0], "Nein.", "Non."], ["en", "de", "fr"]
    mixed = pair.ours.translate(texts, src_lang=languages, tgt_lang="es")
    alone = [
        pair.ours.translate(text, src_lang=code, tgt_lang="es") for text, code in zip(texts, languages, strict=True)
    ]
    assert mixed == alone
    assert pair.ours.translate(texts[1], src_lang="en", tgt_lang="es") != alone[1], "the source's language counts"
    assert pair.ours.tokenizer.src_lang == "en"


def test_tags_say_the_target(pairs):
    pair = pairs["tags"]
    german, french = pair.translate(ENGLISH[0], tgt_lang="deu"), pair.translate(ENGLISH[0], tgt_lang="fra")
    assert german != french
    assert pair.ours.translate(f">>deu<< {ENGLISH[0]}") == german
    assert pair.ours.translate([ENGLISH[0]] * 2, tgt_lang=["deu", "fra"]) == [german, french]
    assert pair.ours.translate([f">>deu<< {ENGLISH[0]}", ENGLISH[0]], tgt_lang=[None, "fra"]) == [german, french]
    for untagged in ({}, {"tgt_lang": ["deu", None]}):
        with pytest.raises(UsageError, match="this model translates into 2 languages: give tgt_lang, one of deu, fra"):
            pair.ours.translate([f">>deu<< {ENGLISH[0]}", ENGLISH[1]], **untagged)


@pytest.mark.parametrize("kind", KINDS)
def test_streamed_pieces_are_the_translation(pairs, kind):
    pair = pairs[kind]
    document = f"{ENGLISH[0]}\n\n{' '.join(ENGLISH)}\n{ENGLISH[3]}"
    expected = pair.translate(document)
    pieces = list(pair.translate(document, stream=True))
    assert "".join(pieces) == expected
    assert len(pieces) > 5
    assert "".join(pair.ours.translate(pair.ours.encode(document, **pair.languages), stream=True)) == expected
    assert list(pair.translate("", stream=True)) == []


def test_a_stream_comes_before_the_end_and_draws_as_asked(pairs):
    pair = pairs["nllb"]
    steps = []
    decoder = pair.ours.network.decoder
    hook = decoder.register_forward_hook(lambda *_: steps.append(1))
    stream = pair.translate(ENGLISH[0], stream=True, max_new_tokens=40, min_new_tokens=40)
    assert not steps
    next(stream)
    before = len(steps)
    list(stream)
    hook.remove()
    assert 0 < before < len(steps)
    draws = [
        "".join(
            pair.translate(
                ENGLISH[0],
                stream=True,
                do_sample=True,
                temperature=2.0,
                generator=torch.Generator().manual_seed(seed),
            )
        )
        for seed in (1, 1, 2)
    ]
    assert draws[0] == draws[1] != draws[2]


def test_a_stream_keeps_up_with_a_tokenizer_that_cleans_spaces_up(pairs):
    pair = pairs["nllb"]
    tokenizer = pair.ours.tokenizer
    tokenizer.clean_up_tokenization_spaces = True
    try:
        for text in ENGLISH:
            for seed in range(5):
                draw = {"do_sample": True, "temperature": 3.0, "max_new_tokens": 30}
                generators = [torch.Generator().manual_seed(seed) for _ in range(2)]
                expected = pair.translate(text, **draw, generator=generators[0])
                assert "".join(pair.translate(text, stream=True, **draw, generator=generators[1])) == expected
    finally:
        tokenizer.clean_up_tokenization_spaces = False


@pytest.mark.parametrize(
    ("texts", "arguments", "message"),
    [
        (ENGLISH, {}, "stream=True takes one text, not a list"),
        (ENGLISH[0], {"num_beams": 2}, "use num_beams=1 and num_return_sequences=1"),
        (ENGLISH[0], {"do_sample": True, "num_return_sequences": 2}, "use num_beams=1 and num_return_sequences=1"),
        (ENGLISH[0], {"return_scores": True}, "stream=True gives text only"),
        (ENGLISH[0], {"return_alignment": True}, "stream=True gives text only"),
        (ENGLISH[0], {"batch_tokens": 3}, "leave batch_tokens and progress out"),
        (ENGLISH[0], {"progress": True}, "leave batch_tokens and progress out"),
    ],
)
def test_what_cannot_be_streamed_is_refused_at_once(pairs, texts, arguments, message):
    with pytest.raises(UsageError, match=message):
        pairs["marian"].translate(texts, stream=True, **arguments)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_our_own_form_does_not_depend_on_company(translators, num_beams):
    own = translators["own"]
    alone = [own.translate(text, num_beams=num_beams) for text in ENGLISH]
    assert own.translate(ENGLISH, num_beams=num_beams) == alone
    assert len(set(alone)) > 2
    assert not own.is_stock
    assert "".join(own.translate(ENGLISH[1], stream=True)) == own.translate(ENGLISH[1])


def test_a_training_network_goes_on_training(pairs):
    pair = pairs["marian"]
    expected = pair.translate(ENGLISH[:2])
    pair.ours.network.train()
    try:
        assert pair.translate(ENGLISH[:2]) == expected
        assert "".join(pair.translate(ENGLISH[0], stream=True)) == expected[0]
        assert pair.ours.network.training
    finally:
        pair.ours.network.eval()
