"""What decoding takes beside the weights: as computed, as measured, and how it grows."""

from __future__ import annotations

import pytest

from mmattn.errors import UsageError
from mmattn.inference.translator import Translator
from tests.inference.tiny_translators import ENGLISH, POSITIONS


@pytest.mark.parametrize("kind", ["marian", "own"])
@pytest.mark.parametrize(("new_tokens", "window"), [(17, None), (31, None), (52, None), (52, 5), (17, 11)])
@pytest.mark.parametrize("num_beams", [1, 3])
def test_cache_bytes_is_what_decoding_allocates(translators, kind, num_beams, new_tokens, window):
    """A text without end fills the storage: start token and all new tokens, or twice the window."""
    translator = translators[kind]
    length = len(translator.tokenizer(ENGLISH[0]).input_ids)
    arguments = {"num_beams": num_beams, "min_new_tokens": new_tokens, "max_new_tokens": new_tokens}
    translator.translate(ENGLISH[0], window=window, **arguments)
    expected = translator.cache_bytes(length, new_tokens + 1, num_beams=num_beams, window=window)
    assert translator.peak_memory == expected
    assert expected.total == expected.context + expected.cache
    texts = [ENGLISH[0]] * 7
    translator.translate(texts, window=window, **arguments)
    many = translator.cache_bytes(length, new_tokens + 1, batch_size=7, num_beams=num_beams, window=window)
    assert translator.peak_memory == many
    assert (many.context, many.cache) == (7 * expected.context, 7 * expected.cache)


def test_beams_share_the_source_and_grouped_heads_save(translators):
    translator, own = translators["marian"], translators["own"]
    uses = {}
    for num_beams in (1, 5):
        translator.translate(ENGLISH[0], num_beams=num_beams, min_new_tokens=20, max_new_tokens=20)
        uses[num_beams] = translator.peak_memory
    assert uses[5].context == uses[1].context == translator.encode(ENGLISH[0]).nbytes
    assert uses[5].cache == 5 * uses[1].cache
    assert own.cache_bytes(1, 1).context == 2 * 2 * 2 * 6 * 4  # layers, keys and values, 2 of 6 heads of 6, bytes
    assert own.cache_bytes(11, 7, num_beams=3).cache == 21 * own.cache_bytes(1, 1).cache


def test_storage_grows_in_steps_and_never_beyond_twice(translators):
    translator = translators["marian"]
    for new_tokens in (33, 40):
        translator.translate(ENGLISH[0], min_new_tokens=new_tokens, max_new_tokens=52, bad_words_ids=None)
        held = translator.cache_bytes(1, new_tokens).cache
        assert held <= translator.peak_memory.cache <= 2 * held


def test_padding_adds_its_mask_only(translators):
    translator = translators["marian"]
    lengths = [len(translator.tokenizer(text).input_ids) for text in ENGLISH]
    translator.translate(ENGLISH, max_new_tokens=5)
    keys_and_values = translator.cache_bytes(max(lengths), 1, batch_size=5).context
    assert translator.peak_memory.context == keys_and_values + 3 * 5 * max(lengths)


def test_memory_follows_the_type(translator_folders, translators):
    half = Translator.from_pretrained(translator_folders["marian"], dtype="bfloat16", device="cpu")
    assert half.cache_bytes(11, 7).total * 2 == translators["marian"].cache_bytes(11, 7).total
    half.translate(ENGLISH[0], min_new_tokens=31, max_new_tokens=31)
    assert half.peak_memory == half.cache_bytes(len(half.tokenizer(ENGLISH[0]).input_ids), 32)


def test_a_wide_window_changes_nothing_and_a_narrow_one_does(translators):
    translator = translators["own"]
    whole = translator.translate(ENGLISH)
    assert translator.translate(ENGLISH, window=POSITIONS) == whole
    assert translator.translate(ENGLISH, window=2) != whole
    assert "".join(translator.translate(ENGLISH[1], window=2, stream=True)) == translator.translate(
        ENGLISH[1], window=2
    )
    with pytest.raises(UsageError, match="window is 0, it must be at least 1"):
        translator.translate(ENGLISH, window=0)
