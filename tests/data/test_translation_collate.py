"""Batches for a translator: layouts of all three tokenizers, padding, lengths, guided alignments."""

from __future__ import annotations

import dataclasses
import pickle

import numpy as np
import pytest
import torch

from mmattn.data.scenes.translation import SceneTranslations
from mmattn.data.sentence_pairs import JoinedPairs, SelectedPairs, SentencePair
from mmattn.data.translation_collate import TranslationCollator
from mmattn.data.translation_tokenizer import train_marian_tokenizer
from mmattn.data.translation_tokens import PairTokenizer, drop_too_long, token_lengths
from mmattn.errors import DataError, UsageError
from tests.data.tiny_tokenizers import tiny_m2m100, tiny_nllb

DATA = SceneTranslations("train", 3000)
PAIRS = DATA.pairs(range(3000))
TEXTS = [text for pair in PAIRS for text in (pair.source, pair.target)]


@pytest.fixture(scope="module")
def marian():
    return train_marian_tokenizer(TEXTS, "unigram", 300, byte_fallback=False)


@pytest.fixture(scope="module")
def tagged():
    return train_marian_tokenizer(TEXTS, "bpe", 300, byte_fallback=False, languages=["de", "en"])


@pytest.fixture(scope="module")
def nllb():
    return tiny_nllb(TEXTS)


@pytest.fixture(scope="module")
def m2m100(tmp_path_factory):
    return tiny_m2m100(TEXTS, tmp_path_factory.mktemp("m2m100"))


def _collator(tokenizer, **options) -> TranslationCollator:
    return TranslationCollator(tokenizer, **{"decoder_start_id": tokenizer.pad_token_id, **options})


def test_marian_layout(marian):
    pairs = PAIRS[:7]
    batch = _collator(marian)(DATA, [(0, index) for index in range(7)])
    stock = marian([pair.source for pair in pairs], text_target=[pair.target for pair in pairs])
    sizes = [len(ids) for ids in stock.input_ids], [len(ids) for ids in stock.labels]
    assert batch["source_ids"].shape == batch["source_mask"].shape == (7, max(sizes[0]))
    assert batch["target_ids"].shape == batch["labels"].shape == (7, max(sizes[1]))
    assert {key: array.dtype for key, array in batch.items()} == {
        "source_ids": torch.int64,
        "source_mask": torch.bool,
        "target_ids": torch.int64,
        "labels": torch.int64,
    }
    for row, (source, target) in enumerate(zip(stock.input_ids, stock.labels, strict=True)):
        padding = [
            len(size) - len(own) for size, own in ((range(max(sizes[0])), source), (range(max(sizes[1])), target))
        ]
        assert batch["source_ids"][row].tolist() == source + [marian.pad_token_id] * padding[0]
        assert batch["source_mask"][row].tolist() == [True] * len(source) + [False] * padding[0]
        assert batch["labels"][row].tolist() == target + [-100] * padding[1]
        assert (
            batch["target_ids"][row].tolist()
            == [marian.pad_token_id, *target[:-1]] + [marian.pad_token_id] * padding[1]
        )


def test_a_tag_names_the_target_language(tagged):
    text = "there is a red ring"
    pair = SentencePair("1", text, "es gibt einen roten Ring", "en", "de")
    back = SentencePair("2", pair.target, text, "de", "en")
    told = SentencePair("3", f">>en<< {pair.target}", text)
    batch = _collator(tagged).collate([pair, back, told])
    for row, source in enumerate([f">>de<< {text}", f">>en<< {pair.target}", f">>en<< {pair.target}"]):
        assert batch["source_ids"][row][batch["source_mask"][row]].tolist() == tagged(source).input_ids
    with pytest.raises(
        DataError, match=r"4 has no tgt_lang, which this tokenizer needs: give one of its codes \(de, en"
    ):
        _collator(tagged).collate([SentencePair("4", text, text)])
    with pytest.raises(DataError, match="5: tgt_lang='deu' is no language of this model; nearest: de"):
        _collator(tagged).collate([SentencePair("5", text, text, "en", "deu")])


@pytest.mark.parametrize("kind", ["nllb", "m2m100"])
def test_language_token_layout(kind, request):
    tokenizer = request.getfixturevalue(kind)
    codes = {"en": "eng_Latn", "de": "deu_Latn"} if kind == "nllb" else {}
    en, de = codes.get("en", "en"), codes.get("de", "de")
    pairs = [
        PAIRS[0],
        dataclasses.replace(PAIRS[1], source=PAIRS[1].target, target=PAIRS[1].source, src_lang="de", tgt_lang="en"),
    ]
    options = {"decoder_start_id": tokenizer.eos_token_id, "language_codes": codes}
    batch = TranslationCollator(tokenizer, **options).collate(pairs)
    scored = TranslationCollator(tokenizer, **options, score_language=True).collate(pairs)
    for row, (pair, src, tgt) in enumerate(zip(pairs, (en, de), (de, en), strict=True)):
        tokenizer.src_lang, tokenizer.tgt_lang = src, tgt
        stock = tokenizer(pair.source, text_target=pair.target)
        size = len(stock.labels)
        assert batch["source_ids"][row][batch["source_mask"][row]].tolist() == stock.input_ids
        assert batch["target_ids"][row, :size].tolist() == [tokenizer.eos_token_id, *stock.labels[:-1]]
        assert scored["labels"][row, :size].tolist() == stock.labels
        assert batch["labels"][row, :size].tolist() == [-100, *stock.labels[1:]]
        assert (batch["labels"][row, size:] == -100).all()
    with pytest.raises(DataError, match=r"scenes/train/0: src_lang='xx' is no language .*; name it in language_codes"):
        TranslationCollator(tokenizer, **options).collate([dataclasses.replace(PAIRS[0], src_lang="xx")])


def test_words_come_out_as_their_tokens(marian, tagged, nllb, m2m100):
    codes = {"en": "eng_Latn", "de": "deu_Latn"}
    for tokenizer in (
        PairTokenizer(marian),
        PairTokenizer(tagged),
        PairTokenizer(nllb, language_codes=codes),
        PairTokenizer(m2m100),
    ):
        for pair, row in zip(PAIRS[:50], tokenizer(PAIRS[:50]), strict=True):
            ids = [row.source[place] for place in row.text]
            places = tokenizer.word_places(pair.source, len(ids), is_target=False)
            decoded = [tokenizer.tokenizer.decode([ids[place] for place in word]) for word in places]
            assert decoded == pair.source.split()


def test_fast_ids_are_the_tokenizer_s_own(marian, tagged):
    texts = [*TEXTS[:100], "Größe </s> 日本", "<pad>", "", " two  spaces ", ">>xx<< no tag"]
    pairs = [SentencePair(str(number), text, text, "en", "de") for number, text in enumerate(texts)]
    for number, row in enumerate(PairTokenizer(marian)(pairs)):
        assert (row.source, row.target) == (
            marian(texts[number]).input_ids,
            marian(text_target=texts[number]).input_ids,
        )
        alone = PairTokenizer(marian)([pairs[number]])[0]
        assert alone == row
    for number, row in enumerate(PairTokenizer(tagged)(pairs)):
        assert row.source == tagged(f">>de<< {texts[number]}").input_ids


def _dense(links: dict[int, list[int]], rows: int, columns: int) -> np.ndarray:
    matrix = np.zeros((rows, columns), dtype=np.float32)
    for row, places in links.items():
        matrix[row, places] = 1 / len(places)
    return matrix


def test_word_alignments_become_token_alignments(marian):
    pair = SentencePair("1", "is türkis", "ist Quadraten da", alignment=((0, 0), (1, 0), (1, 1)))
    source = [len(marian.tokenize(word)) for word in ("is", "türkis")]
    target = [len(marian.tokenize(word)) for word in ("ist", "Quadraten", "da")]
    assert source[1] > 1
    other = dataclasses.replace(PAIRS[0], alignment=None)
    batch = _collator(marian, with_alignment=True).collate([pair, other])
    assert batch["alignment"].shape == (*batch["labels"].shape, batch["source_ids"].shape[1])
    assert batch["alignment"].dtype == torch.float32
    first, second = list(range(sum(source))), list(range(source[0], sum(source)))
    expected = {row: first for row in range(target[0])} | {target[0] + row: second for row in range(target[1])}
    assert np.array_equal(batch["alignment"][0].numpy(), _dense(expected, *batch["alignment"].shape[1:]))
    assert not batch["alignment"][1].any()


@pytest.mark.parametrize("kind", ["marian", "tagged", "nllb", "m2m100"])
def test_gold_alignments_of_scenes_point_at_the_right_tokens(kind, request):
    tokenizer = request.getfixturevalue(kind)
    codes = {"en": "eng_Latn", "de": "deu_Latn"} if kind == "nllb" else None
    pair = SentencePair("1", "the ring is red", "der Ring ist rot", "en", "de", ((0, 0), (1, 1), (2, 2), (3, 3)))
    batch = _collator(tokenizer, with_alignment=True, language_codes=codes).collate([pair])
    sums = batch["alignment"][0].sum(dim=-1)
    has_prefix = kind in ("nllb", "m2m100")
    assert sums[: int(has_prefix)].tolist() == [0.0] * has_prefix
    assert torch.allclose(sums[int(has_prefix) : -1], torch.ones(()))
    assert sums[-1] == 0
    for row in range(int(has_prefix), batch["labels"].shape[1] - 1):
        source = batch["source_ids"][0][batch["alignment"][0, row] > 0]
        word = tokenizer.decode(source)
        target = tokenizer.decode(batch["labels"][0, row : row + 1])
        assert word in ("the", "ring", "is", "red")
        assert target.strip() in {"the": "der", "ring": "Ring", "is": "ist", "red": "rot"}[word]


def test_alignment_past_the_words_is_refused(marian):
    pair = SentencePair("line 4", "a ring", "ein Ring", alignment=((0, 0), (1, 2)))
    with pytest.raises(DataError, match="line 4: alignment 1-2 points past the words, of which there are 2 and 2"):
        _collator(marian, with_alignment=True).collate([pair])


def test_lengths_are_those_of_the_batches(marian, nllb):
    for tokenizer in (PairTokenizer(marian), PairTokenizer(nllb, language_codes={"en": "eng_Latn", "de": "deu_Latn"})):
        measured = token_lengths(SelectedPairs(DATA, range(5, 16)), tokenizer)
        collator = TranslationCollator(tokenizer, decoder_start_id=2)
        batch = collator.collate(PAIRS[5:16])
        assert measured.lengths.shape == (11, 2)
        assert np.array_equal(measured.lengths[:, 0], batch["source_mask"].sum(dim=1).numpy())
        assert measured.lengths[:, 1].max() == batch["labels"].shape[1]
        assert measured.num_aligned == 11


def test_too_long_pairs_are_left_out_or_refused_but_never_cut(marian):
    tokenizer = PairTokenizer(marian)
    source = SelectedPairs(DATA, range(40))
    measured = token_lengths(source, tokenizer)
    limits = {"max_source_length": int(np.median(measured.lengths[:, 0])), "max_target_length": 30}
    kept, lengths, number = drop_too_long(source, measured, **limits)
    is_long = (measured.lengths > tuple(limits.values())).any(axis=1)
    assert 0 < number == is_long.sum() == 40 - len(kept) == 40 - len(lengths)
    assert [kept[place].id for place in range(len(kept))] == [PAIRS[place].id for place in np.flatnonzero(~is_long)]
    assert drop_too_long(source, measured, max_source_length=99, max_target_length=99)[0] is source
    with pytest.raises(
        DataError, match=rf"scenes/train: {number} of 40 pairs are too long, such as scenes/train/\d+ has"
    ):
        drop_too_long(source, measured, **limits, refuse=True)
    with pytest.raises(DataError, match="40 of 40 pairs are too long"):
        drop_too_long(source, measured, max_source_length=3, max_target_length=3)
    collator = TranslationCollator(tokenizer, 4, 4, decoder_start_id=2)
    with pytest.raises(
        DataError, match=r"scenes/train/0 is too long: \d+ source and \d+ target tokens, allowed are 4 and"
    ):
        collator.collate(PAIRS[:3])


def test_several_target_languages_need_language_tokens(marian, tagged):
    both = JoinedPairs([DATA, SceneTranslations("train", 100, src_lang="de", tgt_lang="en")])
    with pytest.raises(
        DataError, match=r"scenes/train has several target languages \(de, en\), and the tokenizer has no"
    ):
        token_lengths(both, PairTokenizer(marian))
    assert len(token_lengths(both, PairTokenizer(tagged)).lengths) == 3100


def test_wrong_arguments_are_refused(marian):
    with pytest.raises(UsageError, match="max_source_length and max_target_length must be 3 or more, not 2 and 512"):
        _collator(marian, max_source_length=2)
    with pytest.raises(UsageError, match="give language_codes to the PairTokenizer"):
        TranslationCollator(PairTokenizer(marian), decoder_start_id=2, language_codes={})


def test_collators_travel_to_data_workers(tagged, nllb):
    codes = {"en": "eng_Latn", "de": "deu_Latn"}
    for tokenizer, names in ((tagged, None), (nllb, codes)):
        collator = TranslationCollator(tokenizer, decoder_start_id=2, with_alignment=True, language_codes=names)
        expected = collator.collate(PAIRS[:5])
        found = pickle.loads(pickle.dumps(collator)).collate(PAIRS[:5])
        assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_packed_batches_hold_the_same_tokens_without_padding(marian):
    draws = [(0, index) for index in range(7)]
    padded, packed = _collator(marian)(DATA, draws), _collator(marian, packed=True)(DATA, draws)
    sources = [row[mask].tolist() for row, mask in zip(padded["source_ids"], padded["source_mask"], strict=True)]
    is_target = padded["labels"] != -100
    targets = [row[mask].tolist() for row, mask in zip(padded["target_ids"], is_target, strict=True)]
    labels = [row[mask].tolist() for row, mask in zip(padded["labels"], is_target, strict=True)]
    order = sorted(range(7), key=lambda row: (len(targets[row]), len(sources[row])))
    for name, rows in (("source_ids", sources), ("target_ids", targets), ("labels", labels)):
        assert packed[name].tolist() == [token for row in order for token in rows[row]]
        assert packed[name].dtype is torch.int64
    assert packed["source_segments"].lengths == tuple(len(sources[row]) for row in order)
    assert packed["target_segments"].lengths == tuple(len(targets[row]) for row in order)
    with pytest.raises(UsageError, match="alignments are read from padded batches"):
        _collator(marian, packed=True, with_alignment=True)
