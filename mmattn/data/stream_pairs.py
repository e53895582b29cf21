"""Sentence pairs that are read from shards while training."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

import numpy as np
from tqdm import tqdm

from mmattn.data.pair_columns import PairColumns
from mmattn.data.pair_table import PairBuilder, pair_problem, read_alignment, written_alignment
from mmattn.data.parallel_spec import ParallelPart
from mmattn.data.sentence_pairs import SentencePair
from mmattn.data.skipping import SkippingSource
from mmattn.data.stream_rows import StreamedRows
from mmattn.data.translation_tokens import PairTokenizer
from mmattn.data.whole_files import kept_array
from mmattn.errors import DataError

_LOGGER = logging.getLogger(__name__)
_CHUNK = 4096
_FORMAT = 2
_HEADER = 10  # int32 places for what stands before the lengths: four counts, and which pair is the last bad one

PairCheck = Callable[[Sequence[SentencePair]], list[str | None]]
"""What is wrong with each of some pairs, None where nothing is."""


class StreamedPairs:
    """A parallel source of which every row of its shards is a pair.

    A pair that cannot be used is replaced by another, always the same one, until there are too many (`data.max_bad`,
    `data.max_bad_fraction`): nothing is looked through beforehand.

    Args:
        rows: The rows.
        spec: Which column holds what, and the languages.

    Raises:
        DataError: a column that is not there.
    """

    def __init__(self, rows: StreamedRows, spec: ParallelPart) -> None:
        self.streamed_rows, self.spec = rows, spec
        first = next((row for _, row in rows.rows(range(min(len(rows), 100))) if isinstance(row, dict)), None)
        if first is None:
            raise DataError(f"{rows.name}: none of the first rows can be read")
        self.columns = PairColumns(spec, rows.name, list(first), first)
        rows.require_columns(self.columns.used)
        self._used = [column for column in self.columns.used.values() if column is not None]
        self._check: PairCheck | None = None
        self._substitutes = self._skipping()

    @property
    def name(self) -> str:
        """Names the data set in messages."""
        return self.streamed_rows.name

    def __len__(self) -> int:
        return len(self.streamed_rows)

    def __getitem__(self, index: int) -> SentencePair:
        return self.pairs([index])[0]

    def pairs(self, indices: Sequence[int]) -> list[SentencePair]:
        """Many pairs at once; substitutes for those that cannot be used.

        Raises:
            RunError: too many cannot be used, or a shard is gone, or not what it was.
        """
        return [
            self._substitutes[index] if isinstance(pair, DataError) else pair
            for index, pair in zip(indices, self.read(indices), strict=True)
        ]

    def read(self, indices: Sequence[int]) -> list[SentencePair | DataError]:
        """Pairs, or what is wrong with them."""
        found: list[SentencePair | DataError] = []
        for place, values in self.values(indices):
            problem = str(values) if isinstance(values, DataError) else _problem(values)
            found.append(DataError(f"{place}: {problem}") if problem is not None else self._pair(place, values))
        if self._check is not None:
            good = [pair for pair in found if isinstance(pair, SentencePair)]
            reasons = {pair.id: reason for pair, reason in zip(good, self._check(good), strict=True) if reason}
            for number, pair in enumerate(found):
                if isinstance(pair, SentencePair) and pair.id in reasons:
                    found[number] = DataError(f"{pair.id}: {reasons[pair.id]}")
        return found

    def values(self, indices: Sequence[int]) -> list[tuple[str, dict[str, Any] | DataError]]:
        """Where each pair is, and what its columns hold as `PairColumns.values` has it."""
        rows = self.streamed_rows.rows(indices, self._used)
        return [(place, row if isinstance(row, DataError) else self.columns.values(row)) for place, row in rows]

    def checked(self, check: PairCheck) -> StreamedPairs:
        """The same pairs, of which those that `check` finds wrong are replaced too."""
        part = copy.copy(self)
        part._check = check
        part._substitutes = part._skipping()
        return part

    def _skipping(self) -> Any:
        limits = {"max_bad_fraction": self.spec.max_bad_fraction, "max_bad": self.spec.max_bad}
        return SkippingSource(cast(Any, _Strict(self)), seed=self.spec.seed, **limits)

    def _pair(self, place: str, values: Any) -> SentencePair:
        links = written_alignment(values.get("alignment"))
        return SentencePair(
            place,
            values["source"].strip(),
            values["target"].strip(),
            values.get("src_lang") or self.spec.src_lang,
            values.get("tgt_lang") or self.spec.tgt_lang,
            None if links is None else read_alignment(links),
            values.get("kind") or "text",
        )


class _Strict:
    """The same pairs, of which one that cannot be used is an error."""

    def __init__(self, source: StreamedPairs) -> None:
        self.source = source

    @property
    def name(self) -> str:
        return self.source.name

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> SentencePair:
        (pair,) = self.source.read([index])
        if isinstance(pair, DataError):
            raise pair
        return pair


def _problem(values: dict[str, Any]) -> str | None:
    return pair_problem(values["source"], values["target"], values.get("alignment"))


@dataclass(frozen=True, eq=False)
class StreamedLengths:
    """What one pass over streamed pairs says, kept on disk.

    Attributes:
        lengths: int32 [N, 2], mapped from a file: tokens of the source, and places of the decoder; zeros for a pair
            that is left out.
        num_aligned: Pairs with a word alignment.
        num_bad, num_dropped, num_long: Left out because something is wrong with them, on purpose, and as too long.
        last_bad: The number of the last pair with which something is wrong, or -1.
    """

    lengths: np.ndarray
    num_aligned: int
    num_bad: int
    num_dropped: int
    num_long: int
    last_bad: int

    @property
    def num_left_out(self) -> int:
        """All that are left out."""
        return self.num_bad + self.num_dropped + self.num_long


def measure_pairs(
    source: StreamedPairs,
    builder: PairBuilder,
    tokenizer: PairTokenizer,
    fingerprint: str,
    *,
    max_source_length: int,
    max_target_length: int,
    refuse: bool = False,
) -> StreamedLengths:
    """The token counts of every pair, made once for the same shards, tokenizer and settings.

    Args:
        source: The pairs.
        builder: Says which pairs can be used and are wanted.
        tokenizer: Of the model.
        fingerprint: Of the tokenizer.
        max_source_length, max_target_length: Tokens at most, special tokens included; longer pairs are left out.
        refuse: Raise for them instead.

    Raises:
        DataError: too many bad pairs, pairs that are too long where they are refused, languages that do not fit.
    """
    rows, limits = source.streamed_rows, (max_source_length, max_target_length)
    spec = source.spec
    read = [repr(spec.columns), spec.header, spec.quoting]  # shards are the same whichever way they are read
    wanted = [*read, spec.src_lang, spec.tgt_lang, repr(builder.keeps)]
    key = ["lengths", _FORMAT, rows.layout.fingerprint(), fingerprint, tokenizer.codes, limits, refuse, *wanted]
    key.append([shard.mtime_ns for shard in rows.shards])
    pass_over = _Measuring(source, builder, tokenizer, limits, refuse)
    kept = kept_array(rows.index_folder, key, pass_over.write, np.int32, "data.index_folder")
    found = StreamedLengths(kept[_HEADER:].reshape(-1, 2), *kept[:_HEADER].view(np.int64).tolist())
    pass_over.recall(found)
    return found


class _Measuring:
    """One pass over streamed pairs."""

    def __init__(
        self,
        source: StreamedPairs,
        builder: PairBuilder,
        tokenizer: PairTokenizer,
        limits: tuple[int, int],
        refuse: bool,
    ) -> None:
        self.source, self.builder, self.tokenizer = source, builder, tokenizer
        self.limits, self.refuse = limits, refuse
        self.num_aligned = self.num_long = 0
        self.last_bad = -1
        self.is_made = False
        self.targets: set[str | None] = set()

    def write(self, file: BinaryIO) -> None:
        self.is_made = True
        file.write(bytes(4 * _HEADER))
        total = len(self.source)
        with tqdm(total=total, desc="counting tokens", unit="pair", disable=None) as bar:
            for start in range(0, total, _CHUNK):
                lengths = self._chunk(range(start, min(start + _CHUNK, total)))
                file.write(lengths.tobytes())
                bar.update(len(lengths))
        self.builder.require_few_bad()
        dropped = sum(self.builder.dropped.values())
        counts = self.num_aligned, self.builder.num_bad, dropped, self.num_long, self.last_bad
        file.seek(0)
        file.write(np.array(counts, dtype=np.int64).tobytes())

    def recall(self, found: StreamedLengths) -> None:
        """Refuse too many bad pairs as the pass did, where another run or process made it."""
        if self.is_made:
            return
        if found.num_bad:  # the last of them is looked at again, since what is said names it
            self.builder.num_seen, self.builder.num_bad = len(self.source) - 1, found.num_bad - 1
            ((place, values),) = self.source.values([found.last_bad])
            self._accepts(place, values)
        self.builder.num_seen = len(self.source)
        self.builder.require_few_bad()

    def _accepts(self, place: str, values: dict[str, Any] | DataError) -> bool:
        if isinstance(values, DataError):
            self.builder.add_bad(place, str(values))
            return False
        return self.builder.accepts(place, values["source"], values["target"], values.get("alignment"))

    def _chunk(self, indices: range) -> np.ndarray:
        lengths = np.zeros((len(indices), 2), dtype=np.int32)
        places: list[int] = []
        pairs: list[SentencePair] = []
        for number, (place, values) in enumerate(self.source.values(indices)):
            bad_before = self.builder.num_bad
            if self._accepts(place, values):
                places.append(number)
                pairs.append(self.source._pair(place, cast(Any, values)))
            elif self.builder.num_bad > bad_before:
                self.last_bad = indices[number]
        self._require_one_language(pairs)
        if pairs:
            counts = np.array([row.lengths for row in self.tokenizer(pairs)], dtype=np.int32)
            is_long = (counts > self.limits).any(axis=1)
            if self.refuse and is_long.any():
                first = int(is_long.argmax())
                raise DataError(
                    f"{pairs[first].id} has {counts[first, 0]} source and {counts[first, 1]} target tokens, allowed "
                    f"are {self.limits[0]} and {self.limits[1]}; raise the limits, split such pairs at sentence ends, "
                    "or have them left out"
                )
            counts[is_long] = 0
            lengths[places] = counts
            self.num_long += int(is_long.sum())
            self.num_aligned += sum(pair.alignment is not None for pair in pairs)
        return lengths

    def _require_one_language(self, pairs: Sequence[SentencePair]) -> None:
        self.targets.update(pair.tgt_lang for pair in pairs)
        if len(self.targets) > 1 and self.tokenizer.languages.kind == "none":
            named = ", ".join(sorted(map(str, self.targets)))
            raise DataError(
                f"{self.source.name} has several target languages ({named}), and the tokenizer has no language tokens: "
                "train one with languages, or start from a multilingual checkpoint"
            )
