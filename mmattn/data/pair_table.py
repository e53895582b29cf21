"""Sentence pairs that were read, checked and kept, in Arrow memory: a million cost what their text costs.

Text is looked through once, when it is opened. So what is bad is known before work starts, and left out instead of
replaced, and lengths and splits are those of the pairs that are there.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa

from mmattn.data.sentence_pairs import SentencePair
from mmattn.data.skipping import allowed_bad
from mmattn.data.text_rows import has_half_surrogate
from mmattn.errors import DataError

_LOGGER = logging.getLogger(__name__)
_CHUNK = 65_536
_NAMED = 5  # bad lines that the log names one by one
_LINK = re.compile(r"\d+-\d+")
_SCHEMA = pa.schema(
    [
        ("source", pa.large_string()),
        ("target", pa.large_string()),
        ("place", pa.large_string()),
        ("src_lang", pa.string()),
        ("tgt_lang", pa.string()),
        ("alignment", pa.large_string()),
        ("kind", pa.string()),
    ]
)


@dataclass(frozen=True)
class PairFilter:
    """Which pairs are left out though nothing is wrong with them; see `ParallelPart`."""

    min_words: int | None = None
    max_words: int | None = None
    max_ratio: float | None = None
    drop_equal: bool = False
    drop_duplicates: bool = False

    def reason(self, source: str, target: str) -> str | None:
        """Why this pair is left out; None when it stays. Duplicates are not looked for."""
        if self.drop_equal and source == target:
            return "with equal sides"
        if self.min_words is None and self.max_words is None and self.max_ratio is None:
            return None
        fewer, more = sorted((len(source.split()), len(target.split())))
        if self.min_words is not None and fewer < self.min_words:
            return f"of fewer than {self.min_words} words"
        if self.max_words is not None and more > self.max_words:
            return f"of more than {self.max_words} words"
        if self.max_ratio is not None and more > self.max_ratio * fewer:
            return f"with more than {self.max_ratio:g} times the words on one side"
        return None


class PairTable:
    """A parallel source whose texts are in memory.

    Args:
        name: Names the data set in messages.
        table: Rows of source, target, place, src_lang, tgt_lang, alignment ("0-0 1-2" or null) and kind (or null).
        dropped: How many pairs were left out on purpose, by reason.
        num_bad: How many were left out because something was wrong with them.
    """

    def __init__(self, name: str, table: pa.Table, dropped: dict[str, int] | None = None, num_bad: int = 0) -> None:
        self._name, self.dropped, self.num_bad = name, dict(dropped or {}), num_bad
        self.table = table.combine_chunks()

    @property
    def name(self) -> str:
        """Names the data set in messages."""
        return self._name

    def __len__(self) -> int:
        return self.table.num_rows

    def __getitem__(self, index: int) -> SentencePair:
        return self.pairs([index])[0]

    def pairs(self, indices: Sequence[int]) -> list[SentencePair]:
        """Many pairs at once."""
        for index in indices:
            if not 0 <= index < len(self):
                raise IndexError(f"{self.name} has {len(self)} pairs, no number {index}")
        rows = self.table.take(pa.array(indices, type=pa.int64())).to_pylist()
        return [
            SentencePair(
                f"{self.name} {row['place']}",
                row["source"],
                row["target"],
                row["src_lang"],
                row["tgt_lang"],
                read_alignment(row["alignment"]) if row["alignment"] is not None else None,
                row["kind"] or "text",
            )
            for row in rows
        ]

    def describe(self) -> str:
        """One line on what is there and what was left out."""
        parts = [f"{number:,} {reason}" for reason, number in self.dropped.items()]
        parts += [f"{self.num_bad:,} that are bad"] if self.num_bad else []
        return f"{self.name}: {len(self):,} pairs" + (f"; left out: {', '.join(parts)}" if parts else "")

    def keep(self, rows: Sequence[int] | np.ndarray) -> PairTable:
        """Only these pairs."""
        part = self.table.take(pa.array(np.asarray(rows, dtype=np.int64)))
        return PairTable(self.name, part, self.dropped, self.num_bad)

    def split_off(self, fraction: float, seed: int, *, wants_rest: bool) -> PairTable:
        """The pairs of a part of the sentences, drawn by seed, or what that leaves; some on each side.

        A sentence that stands in several pairs lies wholly on one side; so it does in a second data set with the
        languages the other way round.

        Raises:
            DataError: one sentence cannot be split.
        """
        hashes = np.empty(len(self), dtype=np.uint64)
        for start in range(0, len(self), _CHUNK):
            rows = self.table.slice(start, _CHUNK).select(["source", "target", "src_lang", "tgt_lang"]).to_pylist()
            hashes[start : start + len(rows)] = [_hash(_deciding_text(row), seed) for row in rows]
        unique = np.unique(hashes)  # sorted, and so in an order that the seed decides
        if len(unique) < 2:
            raise DataError(
                f"{self.name}: one sentence cannot be split into training and evaluation; give data.eval_path"
            )
        count = min(max(1, round(fraction * len(unique))), len(unique) - 1)
        return self.keep(np.flatnonzero((hashes > unique[count - 1]) == wants_rest))


def _deciding_text(row: dict[str, Any]) -> str:
    src_lang, tgt_lang = row["src_lang"], row["tgt_lang"]
    is_turned = src_lang is not None and tgt_lang is not None and src_lang > tgt_lang
    return " ".join(row["target" if is_turned else "source"].casefold().split())


def _hash(text: str, seed: int) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}/{text}".encode(), digest_size=8).digest(), "little")


def read_alignment(text: str) -> tuple[tuple[int, int], ...]:
    """ "0-0 1-2" as pairs.

    Raises:
        DataError: it is written otherwise.
    """
    links = text.split()
    if not all(_LINK.fullmatch(link) for link in links):
        raise DataError(f"alignment {text!r} is not written as 0-0 1-2")
    return tuple((int(source), int(target)) for source, target in (link.split("-") for link in links))


class PairBuilder:
    """Checks pairs one by one and builds the table.

    Args:
        name: Names the data set in messages.
        src_lang, tgt_lang: The languages of pairs that do not say.
        keeps: What is left out on purpose.
        max_bad_fraction, max_bad: How many bad pairs are too many; see `ParallelPart`.
    """

    def __init__(
        self,
        name: str,
        src_lang: str | None = None,
        tgt_lang: str | None = None,
        *,
        keeps: PairFilter | None = None,
        max_bad_fraction: float = 0.05,
        max_bad: int | None = None,
    ) -> None:
        self.name, self.src_lang, self.tgt_lang = name, src_lang, tgt_lang
        self.keeps = keeps or PairFilter()
        self.max_bad_fraction, self.max_bad = max_bad_fraction, max_bad
        self.dropped: Counter[str] = Counter()
        self.num_seen = self.num_bad = 0
        self._last_bad = ""
        self._rows: list[tuple[str | None, ...]] = []
        self._batches: list[pa.RecordBatch] = []
        self._known: set[bytes] = set()

    def add(
        self,
        place: str,
        source: Any,
        target: Any,
        *,
        src_lang: str | None = None,
        tgt_lang: str | None = None,
        alignment: Any = None,
        kind: str | None = None,
    ) -> None:
        """Takes a pair, or counts why not.

        Args:
            place: Where it is, within the data set: "line 17".
            source, target: The texts; a `DataError` where one could not be read.
            src_lang, tgt_lang: Where they differ from the data set's.
            alignment: "0-0 1-2", a list of pairs, or None.
            kind: The sort of sentence.

        Raises:
            DataError: more bad pairs than `max_bad`.
        """
        if not self.accepts(place, source, target, alignment):
            return
        row = source.strip(), target.strip(), place, src_lang or self.src_lang, tgt_lang or self.tgt_lang
        self._rows.append((*row, written_alignment(alignment), kind))
        if len(self._rows) >= _CHUNK:
            self._flush()

    def accepts(self, place: str, source: Any, target: Any, alignment: Any = None) -> bool:
        """Whether a pair can be used and is wanted; counts it, and why not.

        Raises:
            DataError: more bad pairs than `max_bad`.
        """
        problem = pair_problem(source, target, alignment)
        if problem is not None:
            self.add_bad(place, problem)
            return False
        self.num_seen += 1
        source, target = source.strip(), target.strip()
        reason = self.keeps.reason(source, target) or self._repetition(source, target)
        if reason is not None:
            self.dropped[reason] += 1
        return reason is None

    def add_bad(self, place: str, reason: str) -> None:
        """Counts a pair that cannot be used, and names the first few in the log.

        Raises:
            DataError: more than `max_bad`.
        """
        self.num_seen += 1
        self.num_bad += 1
        self._last_bad = f"{self.name} {place}: {reason}"
        if self.num_bad <= _NAMED:
            _LOGGER.warning("left out %s", self._last_bad)
        if self.max_bad is not None and self.num_bad > self.max_bad:
            self._refuse(self.max_bad)

    def finish(self) -> PairTable:
        """The table.

        Raises:
            DataError: too many bad pairs, or none that can be used.
        """
        self.require_few_bad()
        self._flush()
        batches, self._batches = self._batches, []  # let go of, since the table copies them into one
        table = PairTable(self.name, pa.Table.from_batches(batches, _SCHEMA), self.dropped, self.num_bad)
        del batches
        if self.dropped or self.num_bad:
            _LOGGER.info("%s", table.describe())
        if not len(table):
            raise DataError(f"{table.describe()}: nothing is left")
        return table

    def require_few_bad(self) -> None:
        """Raise `DataError` when there were too many bad pairs, of all that came, or none came."""
        if not self.num_seen:
            raise DataError(f"{self.name} is empty: no sentence pairs")
        allowed = allowed_bad(self.num_seen, self.max_bad_fraction, self.max_bad)
        if self.num_bad > allowed or self.num_bad == self.num_seen:
            self._refuse(allowed)

    def _refuse(self, allowed: int) -> NoReturn:
        raise DataError(
            f"{self.name}: {self.num_bad:,} of {self.num_seen:,} lines so far are bad, {allowed:,} allowed "
            f"(data.max_bad, data.max_bad_fraction); the last: {self._last_bad}"
        )

    def _repetition(self, source: str, target: str) -> str | None:
        if not self.keeps.drop_duplicates:
            return None
        digest = hashlib.blake2b(f"{source}\n{target}".encode(), digest_size=12).digest()
        if digest in self._known:
            return "that came before"
        self._known.add(digest)
        return None

    def _flush(self) -> None:
        if self._rows:
            columns = zip(*self._rows, strict=True)
            arrays = [pa.array(column, field.type) for column, field in zip(columns, _SCHEMA, strict=True)]
            self._batches.append(pa.RecordBatch.from_arrays(arrays, schema=_SCHEMA))
            self._rows = []


def pair_problem(source: Any, target: Any, alignment: Any = None) -> str | None:
    """What is wrong with a pair as it was read; None when nothing is."""
    for side, text in (("source", source), ("target", target)):
        problem = _problem(text)
        if problem is not None:
            return f"the {side} {problem}"
    links = written_alignment(alignment)
    return None if links is None else _alignment_problem(links, source, target)


def _problem(text: Any) -> str | None:
    """What is wrong with one side of a pair."""
    if isinstance(text, DataError):
        return f"is {text}"
    if text is None or (isinstance(text, str) and not text.strip()):
        return "is empty"
    if not isinstance(text, str):
        return f"is {type(text).__name__}, not text"
    if "\n" in (stripped := text.strip()) or "\r" in stripped:
        return "holds a line break; if quote marks are text in that file, set data.quoting=false"
    if has_half_surrogate(text):
        return "holds half of a surrogate pair, which is no character"
    return None


def written_alignment(value: Any) -> str | None:
    """An alignment as text; what cannot be one is left for `_alignment_problem` to name."""
    if value is None or value == "":
        return None
    if isinstance(value, str):
        return " ".join(value.split())
    try:
        return " ".join(f"{source}-{target}" for source, target in value)
    except (TypeError, ValueError):
        return repr(value)


def _alignment_problem(links: str, source: str, target: str) -> str | None:
    try:
        pairs = read_alignment(links)
    except DataError as error:
        return str(error)
    sizes = len(source.split()), len(target.split())
    for one, other in pairs:
        if one >= sizes[0] or other >= sizes[1]:
            return f"alignment {one}-{other} points past the words, of which there are {sizes[0]} and {sizes[1]}"
    return None
