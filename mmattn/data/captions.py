"""Captions among a record's texts, and sources whose records a text-to-image model can learn from."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence

from mmattn.data.records import ImageTextRecord, ImageTextSource, TextItem, read_records, read_texts
from mmattn.data.skipping import SkippingSource
from mmattn.data.stream_rows import sample_numbers, stream_layout
from mmattn.errors import DataError

_TEXTS_AT_ONCE = 1000
_CAPTION_SAMPLE = 20_000  # of a streamed source


def captions_of(texts: Iterable[TextItem]) -> list[str]:
    """The captions among a record's texts, without surrounding spaces; answers to questions are none."""
    return [text for item in texts if item.question is None and (text := item.text.strip())]


def require_captions(name: str, texts: Sequence[TextItem]) -> list[str]:
    """`captions_of`, or `DataError` when there are none; `name` names the record."""
    found = captions_of(texts)
    if not found:
        kinds = ", ".join(sorted({item.kind for item in texts if item.question is not None}))
        has = f"only answers to questions ({kinds})" if kinds else "an empty text"
        raise DataError(f"{name}: no caption, {has}; give every picture a caption, or leave it out")
    return found


def drawn_caption(captions: Sequence[str], uniform: float) -> str:
    """One of the captions, by a uniform number in [0, 1)."""
    return captions[int(uniform * len(captions))]


def all_captions(source: ImageTextSource) -> list[str]:
    """Every caption of a source once, in the order in which they come first; pictures are not opened if avoidable."""
    found: dict[str, None] = {}
    for start in range(0, len(source), _TEXTS_AT_ONCE):
        for texts in read_texts(source, range(start, min(start + _TEXTS_AT_ONCE, len(source)))):
            found.update(dict.fromkeys(captions_of(texts)))
    return list(found)


def known_captions(source: ImageTextSource) -> list[str]:
    """Every caption of a source once; of a streamed one those of some thousand records from all over it."""
    if stream_layout(source) is None:
        return all_captions(source)
    texts = read_texts(source, sample_numbers(source, _CAPTION_SAMPLE, ()))
    return list(dict.fromkeys(captions_of(itertools.chain(*texts))))


class CheckedSource:
    """A source whose records have passed a check as they are read.

    Args:
        source: Any source.
        check: Raises `DataError` for a record that cannot be used.
    """

    def __init__(self, source: ImageTextSource, check: Callable[[ImageTextRecord], None]) -> None:
        self.source, self.check = source, check

    @property
    def name(self) -> str:
        """Names the data set in messages."""
        return self.source.name

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> ImageTextRecord:
        return self.records([index])[0]

    def records(self, indices: Sequence[int]) -> list[ImageTextRecord]:
        """`[self[i] for i in indices]`."""
        records = read_records(self.source, indices)
        for record in records:
            self.check(record)
        return records

    def texts(self, indices: Sequence[int]) -> list[tuple[TextItem, ...]]:
        """The records' texts."""
        return read_texts(self.source, indices)


def checked_source(source: ImageTextSource, check: Callable[[ImageTextRecord], None]) -> ImageTextSource:
    """A source with a check; where unreadable records are skipped and counted, so are those that fail it."""
    if isinstance(source, SkippingSource):
        return SkippingSource(CheckedSource(source.source, check), seed=source.seed, max_bad=source.max_bad)
    return CheckedSource(source, check)
