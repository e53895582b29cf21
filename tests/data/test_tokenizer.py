"""Tokenizers give back the text that went in, are deterministic, and reopen in transformers."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer

from mmattn.data.scenes import SceneDataset
from mmattn.data.tokenizer import SPECIAL_TOKENS, item_texts, train_tokenizer
from mmattn.errors import DataError, UsageError

TEXTS = ["A blackbird.", "is there a red circle?", "the cat's tail", "Ein großes grünes Kreuz", "a red cat"]


def _ids(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("kind", ["word", "bpe"])
def test_round_trip_and_reopening(kind, tmp_path):
    tokenizer = train_tokenizer(TEXTS, kind, vocab_size=400)
    tokenizer.save_pretrained(tmp_path)
    reopened = AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        ids = _ids(tokenizer, text)
        row = [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id, tokenizer.pad_token_id]
        assert tokenizer.decode(row, skip_special_tokens=True) == text
        assert reopened.decode(row, skip_special_tokens=True) == text
        assert _ids(reopened, text) == ids
    for one in (tokenizer, reopened):
        special = (one.pad_token_id, one.bos_token_id, one.sep_token_id, one.eos_token_id, one.unk_token_id)
        assert special == tuple(range(len(SPECIAL_TOKENS)))


@pytest.mark.parametrize("kind", ["word", "bpe"])
def test_order_of_texts_does_not_matter_and_size_is_bounded(kind):
    size = 300 if kind == "bpe" else 10
    tokenizer = train_tokenizer(TEXTS * 2, kind, vocab_size=size)
    again = train_tokenizer(list(reversed(TEXTS * 2)), kind, vocab_size=size)
    assert tokenizer.get_vocab() == again.get_vocab()
    assert len(tokenizer) <= size


def test_words_that_were_never_seen_are_unknown_but_bytes_are_not():
    word, bpe = train_tokenizer(TEXTS, "word"), train_tokenizer(TEXTS, "bpe")
    assert _ids(word, "a zebra") == [*_ids(word, "a"), word.unk_token_id]
    assert bpe.decode(_ids(bpe, "a zebra 🦓")) == "a zebra 🦓"


def test_rare_words_and_case():
    tokenizer = train_tokenizer(["a Cat", "a cat", "a dog"], "word", min_count=2, lowercase=True)
    assert set(tokenizer.get_vocab()) == {*SPECIAL_TOKENS, "▁a", "▁cat"}
    assert tokenizer.decode(_ids(tokenizer, "A CAT")) == "a cat"


def test_scenes_have_a_small_closed_vocabulary():
    train, heldout = SceneDataset("train", 600, max_objects=3), SceneDataset("heldout", 300, max_objects=3)
    tokenizer = train_tokenizer([text for items in train.texts(range(600)) for text in item_texts(items)], "word")
    assert len(tokenizer) < 60
    for items in heldout.texts(range(300)):
        for text in item_texts(items):
            assert tokenizer.unk_token_id not in _ids(tokenizer, text)
            assert tokenizer.decode(_ids(tokenizer, text)) == text


def test_wrong_use_is_refused():
    with pytest.raises(DataError, match="no texts to train a tokenizer on"):
        train_tokenizer(["", "  "])
    with pytest.raises(UsageError, match="unknown tokenizer kind 'char': use word or bpe"):
        train_tokenizer(TEXTS, "char")
    with pytest.raises(UsageError, match="vocab_size 100 is too small for a bpe tokenizer: use 261 or more"):
        train_tokenizer(TEXTS, "bpe", vocab_size=100)
