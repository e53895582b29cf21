"""Trained Marian tokenizers: laid out as OPUS-MT's, open in stock transformers, and give back what went in."""

from __future__ import annotations

import os
import pickle
import random
from pathlib import Path

import pytest
from transformers import AutoTokenizer, MarianTokenizer

import mmattn._optional
from mmattn.data.scenes.translation import SceneTranslations
from mmattn.data.translation_tokenizer import train_marian_tokenizer
from mmattn.errors import DataError, OptionalPackageError, UsageError


def _texts(split: str, count: int) -> list[str]:
    return [text for pair in SceneTranslations(split, count).pairs(range(count)) for text in (pair.source, pair.target)]


TRAINING, HELD_OUT = _texts("train", 12000), _texts("heldout", 200)  # enough for every word
FEW = TRAINING[:3000]
_SIZES = {"word": 600, "bpe": 700, "unigram": 700}


def _round_trip(tokenizer: MarianTokenizer, texts: list[str]) -> list[str]:
    return tokenizer.batch_decode(tokenizer(text_target=texts).input_ids, skip_special_tokens=True)


@pytest.mark.parametrize("kind", ["word", "bpe", "unigram"])
def test_folder_opens_in_transformers_and_gives_texts_back(tmp_path, kind):
    texts = TRAINING if kind == "word" else FEW
    tokenizer = train_marian_tokenizer(
        texts, kind, _SIZES[kind], source_lang="en", target_lang="de", folder=tmp_path / "made"
    )
    assert {"source.spm", "target.spm", "vocab.json", "tokenizer_config.json"} <= set(os.listdir(tmp_path / "made"))
    assert (tmp_path / "made/source.spm").read_bytes() == (tmp_path / "made/target.spm").read_bytes()
    opened = AutoTokenizer.from_pretrained(tmp_path / "made")
    assert type(opened) is MarianTokenizer
    assert opened.get_vocab() == tokenizer.get_vocab()
    assert (opened.source_lang, opened.target_lang) == ("en", "de")
    assert len(opened) <= _SIZES[kind]
    assert opened.convert_ids_to_tokens([0, 1, len(opened) - 1]) == ["</s>", "<unk>", "<pad>"]
    assert (opened.eos_token_id, opened.unk_token_id, opened.pad_token_id) == (0, 1, len(opened) - 1)
    assert _round_trip(opened, HELD_OUT) == HELD_OUT
    assert opened(HELD_OUT).input_ids == opened(text_target=HELD_OUT).input_ids
    assert all(ids[-1] == 0 and 1 not in ids for ids in opened(HELD_OUT).input_ids)
    opened.save_pretrained(tmp_path / "again")
    assert AutoTokenizer.from_pretrained(tmp_path / "again")(HELD_OUT).input_ids == tokenizer(HELD_OUT).input_ids


def test_words_and_punctuation_are_tokens_of_their_own():
    tokenizer = train_marian_tokenizer(TRAINING, "word", 600)
    tokens = tokenizer.tokenize("ist der Kreis, der rot ist, hier?")
    assert tokens == ["▁ist", "▁der", "▁Kreis", "▁,", "▁der", "▁rot", "▁ist", "▁,", "▁hier", "▁?"]
    assert tokenizer("der Bagger ist rot").input_ids.count(tokenizer.unk_token_id) == 1


def test_natural_text_survives_with_bytes_for_unseen_characters():
    tokenizer = train_marian_tokenizer(FEW, "bpe", 700)
    texts = ["Größe 3,5 cm… (½)\u00a0– “ja”", "日本語 & <b>", "naïve\u2009café"]
    assert _round_trip(tokenizer, texts) == texts
    plain = train_marian_tokenizer(FEW, "bpe", 300, byte_fallback=False)
    assert plain.unk_token_id in plain("日本語").input_ids


@pytest.mark.parametrize("kind", ["word", "unigram"])
def test_equal_texts_give_equal_tokenizers_in_any_order(tmp_path, kind):
    shuffled = list(FEW)
    random.Random(0).shuffle(shuffled)
    for name, texts in (("a", FEW), ("b", iter(shuffled))):
        train_marian_tokenizer(texts, kind, _SIZES[kind], folder=tmp_path / name)
    for file in ("source.spm", "vocab.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_languages_are_single_tokens(tmp_path):
    tokenizer = train_marian_tokenizer(FEW, "unigram", 700, languages=["de", "fr", "pt_BR"], folder=tmp_path)
    opened = AutoTokenizer.from_pretrained(tmp_path)
    assert sorted(opened.supported_language_codes) == [">>de<<", ">>fr<<", ">>pt_BR<<"]
    assert opened.convert_ids_to_tokens(opened(">>pt_BR<< there is a ring").input_ids)[0] == ">>pt_BR<<"
    assert opened(">>fr<< there is a ring").input_ids[1:] == opened("there is a ring").input_ids
    assert len(opened) == len(tokenizer) <= 700
    assert opened.pad_token_id == len(opened) - 1


def test_temporary_files_live_as_long_as_the_tokenizer():
    tokenizer = train_marian_tokenizer(TRAINING, "word", 600)
    folder = Path(tokenizer.spm_files[0]).parent
    assert pickle.loads(pickle.dumps(tokenizer))("a red ring").input_ids == tokenizer("a red ring").input_ids
    assert folder.is_dir()
    del tokenizer
    assert not folder.exists()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"kind": "char"}, UsageError, "unknown tokenizer kind 'char': use one of word, bpe, unigram"),
        ({"kind": "bpe", "vocab_size": 100}, UsageError, "vocab_size 100 is too small for a bpe tokenizer: use 260"),
        (
            {"kind": "bpe", "vocab_size": 20, "byte_fallback": False},
            UsageError,
            r"no bpe tokenizer of 20 entries can be trained: the characters of the texts alone take \d+; raise vocab_s",
        ),
        ({"languages": ["de DE"]}, UsageError, "'de DE' cannot name a language"),
        ({"texts": ["", "  "]}, DataError, "no texts to train a tokenizer on"),
    ],
)
def test_wrong_arguments_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        train_marian_tokenizer(**{"texts": TRAINING[:100], **arguments})


def test_a_missing_package_is_named(monkeypatch):
    def missing(name: str):
        raise ImportError(name)

    monkeypatch.setattr(mmattn._optional.importlib, "import_module", missing)
    with pytest.raises(OptionalPackageError, match=r"sentencepiece, which is not installed: pip install 'mmattn\[reci"):
        train_marian_tokenizer(TRAINING[:100])
