"""What every parallel corpus hands out, whatever it was read from."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from mmattn.errors import DataError


@dataclass(frozen=True)
class SentencePair:
    """A sentence and its translation.

    Args:
        id: Names the pair in messages and results; stable between runs.
        source: The sentence.
        target: Its translation.
        src_lang, tgt_lang: Languages, as the tokenizer names them; None where there is only one pair of languages.
        alignment: Which words stand for each other, as (source word, target word) over words split at white space;
            None where nobody said.
        kind: What sort of sentence it is, for scores by kind.
    """

    id: str
    source: str
    target: str
    src_lang: str | None = None
    tgt_lang: str | None = None
    alignment: tuple[tuple[int, int], ...] | None = None
    kind: str = "text"


@runtime_checkable
class ParallelSource(Protocol):
    """A data set of sentence pairs; `source[i]` is the same pair whenever it is asked for."""

    @property
    def name(self) -> str:
        """Names the data set in messages."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> SentencePair: ...


@runtime_checkable
class BatchedPairs(ParallelSource, Protocol):
    """A source that makes many pairs at once faster than one by one."""

    def pairs(self, indices: Sequence[int]) -> list[SentencePair]:
        """`[self[i] for i in indices]`."""
        ...


def read_pairs(source: ParallelSource, indices: Sequence[int]) -> list[SentencePair]:
    """`[source[i] for i in indices]`, in one call where the source can."""
    if isinstance(source, BatchedPairs):
        return source.pairs(indices)
    return [source[index] for index in indices]


def spread(size: int, limit: int | None) -> np.ndarray:
    """At most `limit` of `size` numbers, int64, evenly spread from the first to the last; all of them for None."""
    if limit is None or limit >= size:
        return np.arange(size)
    return np.linspace(0, size - 1, limit).round().astype(np.int64)


class SelectedPairs:
    """Some pairs of a source, in a given order.

    Args:
        source: Where they are.
        indices: Which.
    """

    def __init__(self, source: ParallelSource, indices: Sequence[int] | np.ndarray) -> None:
        self.source, self.indices = source, np.asarray(indices, dtype=np.int64)

    @property
    def name(self) -> str:
        """Names the data set in messages."""
        return self.source.name

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> SentencePair:
        return self.pairs([index])[0]

    def pairs(self, indices: Sequence[int]) -> list[SentencePair]:
        """Many pairs at once."""
        return read_pairs(self.source, self.indices[np.asarray(indices, dtype=np.int64)].tolist())


class JoinedPairs:
    """Several sources, one after the other: several target languages in one run.

    Args:
        sources: At least one.

    Raises:
        DataError: no source.
    """

    def __init__(self, sources: Sequence[ParallelSource]) -> None:
        if not sources:
            raise DataError("no data sets to put together")
        self.sources = list(sources)
        self._ends = list(itertools.accumulate(len(source) for source in self.sources))

    @property
    def name(self) -> str:
        """Names the data set in messages."""
        return " + ".join(source.name for source in self.sources)

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> SentencePair:
        return self.pairs([index])[0]

    def pairs(self, indices: Sequence[int]) -> list[SentencePair]:
        """Many pairs at once, in one call for each source."""
        by_source: dict[int, list[tuple[int, int]]] = {}
        for place, index in enumerate(indices):
            if not 0 <= index < len(self):
                raise IndexError(f"{self.name} has {len(self)} pairs, no number {index}")
            number = bisect.bisect_right(self._ends, index)
            by_source.setdefault(number, []).append((place, index - ([0, *self._ends][number])))
        found: dict[int, SentencePair] = {}
        for number, wanted in by_source.items():
            pairs = read_pairs(self.sources[number], [index for _, index in wanted])
            found.update(zip((place for place, _ in wanted), pairs, strict=True))
        return [found[place] for place in range(len(indices))]
