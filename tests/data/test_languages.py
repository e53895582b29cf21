"""What tokenizers are told of languages: kinds, codes, unknown ones by message, ids as stock tokenizers give them."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from mmattn.data.languages import LanguageCodes
from mmattn.data.translation_tokenizer import train_marian_tokenizer
from mmattn.errors import UsageError
from tests.data.tiny_tokenizers import tiny_m2m100, tiny_nllb, tiny_opus

ENGLISH = ["The red circle is left of the blue square.", "A small cat sees two dogs.", "How many are there?", "No."]
GERMAN = ["Der rote Kreis ist links vom blauen Quadrat.", "Eine kleine Katze sieht zwei Hunde.", "Wie viele?", "Nein."]
KINDS = ("pair", "two vocabularies", "tag", "trained tag", "m2m100", "nllb")


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """Each opened from its folder by `AutoTokenizer`, as users open them."""

    def folder() -> Path:
        return Path(tmp_path_factory.mktemp("tokenizer"))

    made = {
        "pair": tiny_opus(ENGLISH, GERMAN, folder()),
        "two vocabularies": tiny_opus(ENGLISH, GERMAN, folder(), separate_vocabs=True),
        "tag": tiny_opus(ENGLISH, GERMAN, folder(), tags=["deu", "fra", "nld"]),
        "trained tag": train_marian_tokenizer([*ENGLISH, *GERMAN], vocab_size=350, languages=["de", "pt_BR"]),
        "m2m100": tiny_m2m100([*ENGLISH, *GERMAN], folder()),
        "nllb": tiny_nllb([*ENGLISH, *GERMAN], ["eng_Latn", "deu_Latn", "fra_Latn", "zho_Hans"]),
    }
    opened = {}
    for name, tokenizer in made.items():
        where = folder()
        tokenizer.save_pretrained(where)
        opened[name] = AutoTokenizer.from_pretrained(where)
        assert type(opened[name]) is type(tokenizer)
    return opened


@pytest.mark.parametrize(
    ("name", "kind", "known"),
    [
        ("pair", "none", ()),
        ("two vocabularies", "none", ()),
        ("tag", "tag", ("deu", "fra", "nld")),
        ("trained tag", "tag", ("de", "pt_BR")),
        ("nllb", "token", ("deu_Latn", "eng_Latn", "fra_Latn", "zho_Hans")),
    ],
)
def test_kind_and_codes(tokenizers, name, kind, known):
    codes = LanguageCodes(tokenizers[name])
    assert (codes.kind, codes.known) == (kind, known)


def test_m2m100_has_its_hundred_codes(tokenizers):
    codes = LanguageCodes(tokenizers["m2m100"])
    assert codes.kind == "token"
    assert len(codes.known) == 100
    assert {"de", "en", "zh"} <= set(codes.known)
    assert codes.known == tuple(sorted(codes.known))


def test_tokens_of_languages_are_in_the_vocabulary(tokenizers):
    for name in KINDS:
        tokenizer = tokenizers[name]
        codes = LanguageCodes(tokenizer)
        assert len(codes.tokens) == len(codes.known)
        assert tokenizer.unk_token_id not in tokenizer.convert_tokens_to_ids(sorted(codes.tokens))


def test_target_tokens_are_stocks(tokenizers):
    m2m100, nllb = tokenizers["m2m100"], tokenizers["nllb"]
    for code in ("de", "zh"):
        assert LanguageCodes(m2m100).target_token(code) == m2m100.get_lang_id(code)
    for code in ("deu_Latn", "zho_Hans"):
        assert LanguageCodes(nllb).target_token(code) == nllb.convert_tokens_to_ids(code)


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        ("tag", "due", r"tgt_lang='due' is no language of this model; nearest: deu \(3 codes, such as deu, fra, nld\)"),
        ("nllb", "de", r"tgt_lang='de' is no language .*; nearest: deu_Latn \(4 codes"),
        ("nllb", "zho_Hant", r"nearest: zho_Hans"),
        ("nllb", "xx", r"tgt_lang='xx' is no language of this model \(4 codes"),
        ("m2m100", "eng", r"nearest: en"),
        ("m2m100", "deu_Latn", r"is no language of this model; nearest: de"),
        ("pair", "de", r"tgt_lang='de': this model translates one pair of languages, leave tgt_lang out"),
        ("nllb", 3, r"tgt_lang=3 is no language code: give a str such as 'deu_Latn'"),
    ],
)
def test_unknown_codes_are_named_with_the_nearest(tokenizers, name, code, message):
    with pytest.raises(UsageError, match=message) as caught:
        LanguageCodes(tokenizers[name]).check(code, "tgt_lang")
    assert "\n" not in str(caught.value)


def test_known_codes_are_given_back(tokenizers):
    assert LanguageCodes(tokenizers["nllb"]).check("fra_Latn", "src_lang") == "fra_Latn"


@pytest.mark.parametrize("name", KINDS)
def test_source_ids_are_what_the_stock_tokenizer_gives(tokenizers, name):
    tokenizer = tokenizers[name]
    assert LanguageCodes(tokenizer).source_ids(ENGLISH) == tokenizer(ENGLISH).input_ids
    assert LanguageCodes(tokenizer).source_ids([]) == []


@pytest.mark.parametrize(("name", "code", "own"), [("m2m100", "de", "en"), ("nllb", "deu_Latn", "eng_Latn")])
def test_a_source_language_counts_for_its_call_only(tokenizers, name, code, own):
    tokenizer = tokenizers[name]
    codes = LanguageCodes(tokenizer)
    before = codes.source_ids(GERMAN)
    tokenizer.src_lang = code
    expected = tokenizer(GERMAN).input_ids
    tokenizer.src_lang = own
    assert codes.source_ids(GERMAN, code) == expected != before
    assert codes.source_ids(GERMAN) == before
    assert tokenizer.src_lang == own
    with pytest.raises(UsageError, match="src_lang='klingon' is no language of this model"):
        codes.source_ids(GERMAN, "klingon")
    assert tokenizer.src_lang == own
    tokenizer.src_lang = code
    assert codes.source_ids(GERMAN) == expected, "none given: the tokenizer's own, whatever that is now"
    tokenizer.src_lang = own


def test_threads_that_share_a_tokenizer_keep_their_languages(tokenizers, monkeypatch):
    tokenizer = tokenizers["m2m100"]
    codes = LanguageCodes(tokenizer)
    wanted = {code: codes.source_ids(GERMAN, code) for code in ("en", "de", None)}
    plain = type(tokenizer).__call__

    def slow(*arguments, **options):
        time.sleep(0.02)  # so that another thread comes between the language and the text
        return plain(*arguments, **options)

    monkeypatch.setattr(type(tokenizer), "__call__", slow)
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda code: codes.source_ids(GERMAN, code), [*wanted, *wanted]))
    assert found == [*wanted.values(), *wanted.values()]


def test_a_tag_says_the_target(tokenizers):
    tokenizer = tokenizers["tag"]
    codes = LanguageCodes(tokenizer)
    tagged = [f">>fra<< {text}" for text in ENGLISH]
    assert codes.source_ids(ENGLISH, tgt_lang="fra") == tokenizer(tagged).input_ids
    assert codes.source_ids(tagged, tgt_lang="deu") == tokenizer(tagged).input_ids, "a text's own tag stays"
    assert [codes.has_tag(text) for text in (">>fra<< No.", ">>xxx<< No.", "No. >>fra<<", "No.")] == [
        True,
        False,
        False,
        False,
    ]
    with pytest.raises(UsageError, match="tgt_lang='de' is no language of this model; nearest: deu"):
        codes.source_ids(ENGLISH, tgt_lang="de")


def test_elsewhere_the_target_changes_no_source(tokenizers):
    codes = LanguageCodes(tokenizers["nllb"])
    assert codes.source_ids(ENGLISH, tgt_lang="fra_Latn") == codes.source_ids(ENGLISH)
