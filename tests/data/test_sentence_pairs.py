"""Sources of sentence pairs, parts of them, and several put together."""

from __future__ import annotations

import pytest

from mmattn.data.sentence_pairs import (
    BatchedPairs,
    JoinedPairs,
    ParallelSource,
    SelectedPairs,
    SentencePair,
    read_pairs,
)
from mmattn.errors import DataError


class _Source:
    def __init__(self, name: str, size: int) -> None:
        self.name, self.size = name, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> SentencePair:
        return SentencePair(f"{self.name}/{index}", f"source {index}", f"target {index}")


def test_selected_pairs_keep_their_order():
    part = SelectedPairs(_Source("a", 11), [7, 2, 5])
    assert isinstance(part, ParallelSource)
    assert isinstance(part, BatchedPairs)
    assert not isinstance(_Source("a", 3), BatchedPairs)
    assert (part.name, len(part), part[1].id) == ("a", 3, "a/2")
    assert [pair.id for pair in read_pairs(part, [2, 0, 0])] == ["a/5", "a/7", "a/7"]
    assert [pair.id for pair in read_pairs(_Source("b", 3), range(2))] == ["b/0", "b/1"]


def test_joined_pairs_stand_one_after_the_other():
    joined = JoinedPairs([_Source("a", 3), SelectedPairs(_Source("b", 9), [8, 1]), _Source("c", 5)])
    assert (joined.name, len(joined)) == ("a + b + c", 10)
    ids = ["a/0", "a/1", "a/2", "b/8", "b/1", "c/0", "c/1", "c/2", "c/3", "c/4"]
    assert [joined[index].id for index in range(10)] == ids
    assert [pair.id for pair in joined.pairs([9, 0, 4, 3, 0])] == ["c/4", "a/0", "b/1", "b/8", "a/0"]
    with pytest.raises(IndexError, match=r"a \+ b \+ c has 10 pairs, no number 10"):
        joined[10]
    with pytest.raises(DataError, match="no data sets to put together"):
        JoinedPairs([])
