"""Texts cut into what is translated at once, and batched by tokens."""

from __future__ import annotations

import pytest
import torch

from mmattn.errors import UsageError
from mmattn.inference.segments import Document, split_line
from mmattn.inference.sources import each_text, padded, token_batches


def words(text: str) -> int:
    return len(text.split())


def split(line: str, limit: int, count=words) -> list[str]:
    return split_line(line, count, limit, may_split=True, place="text 1")


@pytest.mark.parametrize(
    ("line", "limit", "parts"),
    [
        ("one two. three four.", 4, ["one two. three four."]),
        ("one two. three four.", 3, ["one two.", "three four."]),
        ("a b. c. d e f. g.", 4, ["a b. c.", "d e f. g."]),
        ("a b! c d? e f… g h.", 2, ["a b!", "c d?", "e f…", "g h."]),
        ('He said "a b." Then c d.', 4, ['He said "a b."', "Then c d."]),
        ("(a b c.) d e f.", 3, ["(a b c.)", "d e f."]),
        ("»a b c.« d e f.", 3, ["»a b c.«", "d e f."]),
        ("„a b c.“ d e f.", 3, ["„a b c.“", "d e f."]),
        ("pi is 3.14 now. e is 2.71 then.", 4, ["pi is 3.14 now.", "e is 2.71 then."]),
        ("a b.   c  d.", 2, ["a b.", "c  d."]),
        ("a b.   c  d. e f.", 4, ["a b.   c  d.", "e f."]),
    ],
)
def test_lines_are_cut_at_sentence_ends_into_as_few_parts_as_fit(line, limit, parts):
    assert split(line, limit) == parts


def test_ideographic_sentences_need_no_space():
    line = "赤い円。青い四角！緑の三角？終わり。"
    assert split(line, 9, len) == ["赤い円。青い四角！", "緑の三角？終わり。"], "joined as they stood, without a space"
    assert split(line, 5, len) == ["赤い円。", "青い四角！", "緑の三角？", "終わり。"]


def test_every_part_fits_and_nothing_is_lost():
    line = " ".join(f"{'w ' * (number % 5)}end{number}." for number in range(40))
    for limit in (5, 7, 13, 29):
        parts = split(line, limit)
        assert " ".join(parts) == line
        assert max(map(words, parts)) <= limit
        firsts = [part.split(".")[0] + "." for part in parts[1:]]
        assert all(words(f"{part} {first}") > limit for part, first in zip(parts, firsts, strict=False))


def test_lines_that_fit_are_counted_once():
    calls = []

    def count(text: str) -> int:
        calls.append(text)
        return words(text)

    assert split_line("a. b. c.", count, 3, may_split=True, place="x") == ["a. b. c."]
    assert calls == ["a. b. c."]


def test_what_cannot_be_cut_is_refused():
    with pytest.raises(UsageError, match=r"^text 7 has 4 tokens, this model takes 3: shorten it, or let it be split"):
        split_line("a b c d", words, 3, may_split=False, place="text 7")
    with pytest.raises(UsageError, match=r"^text 1 holds a sentence of 4 tokens, this model takes 3: cut it \('b c"):
        split("a. b c d e. f.", 3)


def test_a_documents_segments_are_in_order():
    assert Document([[0], [], [1, 2]]).segments == [0, 1, 2]
    assert Document([[]]).segments == []


@pytest.mark.parametrize("budget", [1, 7, 20, 64, 1000])
def test_batches_hold_what_their_budget_allows(budget):
    lengths = [int(n) for n in torch.randint(1, 23, (57,), generator=torch.Generator().manual_seed(0))]
    batches = list(token_batches(lengths, budget))
    assert sorted(number for batch in batches for number in batch) == list(range(57))
    for batch in batches:
        longest = max(lengths[number] for number in batch)
        assert len(batch) == 1 or longest * len(batch) <= budget
    order = [lengths[number] for batch in batches for number in batch]
    assert order == sorted(lengths, reverse=True), "the longest come first: a run that lacks memory fails at once"
    for batch in batches[:-1]:
        assert lengths[batch[0]] * (len(batch) + 1) > budget, "no batch is smaller than it must be"


def test_no_rows_no_batches():
    assert list(token_batches([], 10)) == []


def test_rows_are_padded_and_masked():
    ids, mask = padded([[3, 5, 7], [11], [13, 17]], 59, torch.device("cpu"))
    assert ids.tolist() == [[3, 5, 7], [11, 59, 59], [13, 17, 59]]
    assert mask is not None
    assert mask.tolist() == [[True] * 3, [True, False, False], [True, True, False]]
    ids, mask = padded([[3, 5], [7, 11]], 59, torch.device("cpu"))
    assert ids.tolist() == [[3, 5], [7, 11]]
    assert mask is None, "nothing is padded, so nothing is masked"


def test_a_language_for_each_text():
    assert each_text(None, 3, "tgt_lang") == [None] * 3
    assert each_text("de", 3, "tgt_lang") == ["de"] * 3
    assert each_text(("de", "fr"), 2, "tgt_lang") == ["de", "fr"]
    with pytest.raises(UsageError, match="1 tgt_lang for 2 texts: give one, or one for each text"):
        each_text(["de"], 2, "tgt_lang")
    with pytest.raises(UsageError, match="src_lang is a set: give one code, or one for each text"):
        each_text({"de"}, 1, "src_lang")  # type: ignore[arg-type]
