"""The translation memory that a translator has to beat: the training sentence most like the source, by n-grams."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mmattn.data.sentence_pairs import SentencePair

_ORDER = 4  # characters of an n-gram
_BUCKETS = 1 << 20
_PRIME = np.uint64(0x100000001B3)  # of the FNV hash
_MIX = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True, eq=False)
class _Counts:
    """N-gram counts of texts: entry i says that text `rows[i]` has n-gram `buckets[i]` `counts[i]` times."""

    rows: np.ndarray
    buckets: np.ndarray
    counts: np.ndarray


class NearestSentence:
    """Finds the text with the largest cosine of character 4-gram TF-IDF vectors (hashed into 2^20 buckets).

    Args:
        texts: Where to look; at least one.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self.size = len(texts)
        counted = _count(texts)
        present = np.bincount(counted.buckets, minlength=_BUCKETS)
        self._rarity = np.log((1 + self.size) / (1 + present)).astype(np.float32) + 1
        weights = self._weigh(counted, self.size)
        order = np.argsort(counted.buckets, kind="stable")
        self._rows, self._weights = counted.rows[order], weights[order]
        self._starts = np.concatenate([[0], np.cumsum(present)])

    def find(self, texts: Sequence[str]) -> list[int]:
        """For each text the number of the nearest; the first of equally near ones."""
        if not texts:
            return []
        counted = _count(texts)
        weights = self._weigh(counted, len(texts))
        bounds = np.searchsorted(counted.rows, np.arange(len(texts) + 1))
        return [
            self._nearest(counted.buckets[first:last], weights[first:last])
            for first, last in itertools.pairwise(bounds)
        ]

    def _nearest(self, buckets: np.ndarray, weights: np.ndarray) -> int:
        similarity = np.zeros(self.size, dtype=np.float32)
        for bucket, weight in zip(buckets, weights, strict=True):
            place = slice(self._starts[bucket], self._starts[bucket + 1])
            similarity[self._rows[place]] += weight * self._weights[place]  # a text has a bucket once
        return int(similarity.argmax())

    def _weigh(self, counted: _Counts, size: int) -> np.ndarray:
        weights = (1 + np.log(counted.counts)) * self._rarity[counted.buckets]
        norms = np.sqrt(np.bincount(counted.rows, weights**2, minlength=size))
        return (weights / norms[counted.rows]).astype(np.float32)


def _count(texts: Sequence[str]) -> _Counts:
    """The n-grams of texts, a space put before and after each; sorted by text."""
    padded = [f" {text} ".ljust(_ORDER) for text in texts]
    characters = np.frombuffer("".join(padded).encode("utf-32-le", "surrogatepass"), dtype=np.uint32).astype(np.uint64)
    lengths = np.array([len(text) for text in padded], dtype=np.int64)
    row_of = np.repeat(np.arange(len(texts)), lengths)
    number = len(characters) - _ORDER + 1
    hashes = np.zeros(number, dtype=np.uint64)
    for offset in range(_ORDER):
        hashes = (hashes ^ characters[offset : offset + number]) * _PRIME
    buckets = (hashes * _MIX >> np.uint64(64 - _BUCKETS.bit_length() + 1)).astype(np.int64)
    is_whole = row_of[:number] == row_of[_ORDER - 1 :]
    keys, counts = np.unique(row_of[:number][is_whole] * _BUCKETS + buckets[is_whole], return_counts=True)
    return _Counts(keys // _BUCKETS, keys % _BUCKETS, counts)


class TranslationMemory:
    """Translates by looking up: the translation of the training sentence that is nearest to the source.

    Args:
        pairs: Of the training split; each pair of languages is looked up by itself.
    """

    def __init__(self, pairs: Sequence[SentencePair]) -> None:
        groups: dict[tuple[str | None, str | None], list[SentencePair]] = {}
        for pair in pairs:
            groups.setdefault((pair.src_lang, pair.tgt_lang), []).append(pair)
        self._targets = {key: [pair.target for pair in group] for key, group in groups.items()}
        self._finders = {key: NearestSentence([pair.source for pair in group]) for key, group in groups.items()}

    def translate(self, pairs: Sequence[SentencePair]) -> list[str]:
        """A translation for each pair's source; empty where training has nothing in its languages."""
        found = [""] * len(pairs)
        for key, finder in self._finders.items():
            places = [place for place, pair in enumerate(pairs) if (pair.src_lang, pair.tgt_lang) == key]
            if not places:
                continue
            numbers = finder.find([pairs[place].source for place in places])
            for place, number in zip(places, numbers, strict=True):
                found[place] = self._targets[key][number]
        return found
