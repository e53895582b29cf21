"""Pictures that cannot be read: named, counted, and replaced, until there are too many."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

from mmattn.data.counted import counted
from mmattn.data.draws import draw_generator
from mmattn.data.records import ImageTextRecord, ImageTextSource, TextItem, TextSource
from mmattn.errors import DataError, RunError

_LOGGER = logging.getLogger(__name__)
_TRIES = 100


def allowed_bad(size: int, max_bad_fraction: float, max_bad: int | None) -> int:
    """How many of `size` examples may be bad: `max_bad`, or that part of them, but at least one."""
    return max(1, math.floor(max_bad_fraction * size)) if max_bad is None else max_bad


class SkippingSource:
    """A source in which a record that cannot be read is replaced by another, always by the same one.

    Args:
        source: Raises `DataError` for a record that cannot be read.
        seed: Of the choice of substitutes.
        max_bad_fraction: More unreadable records than this part of the data set stop the run (at least one may be bad).
        max_bad: The same as a number; wins over the fraction.

    Attributes:
        bad: Why each unreadable record was skipped so far, by its index, in this process.
    """

    def __init__(
        self, source: ImageTextSource, *, seed: int = 0, max_bad_fraction: float = 0.05, max_bad: int | None = None
    ) -> None:
        self.source, self.seed = source, seed
        self.max_bad = allowed_bad(len(source), max_bad_fraction, max_bad)
        self.bad: dict[int, str] = {}

    @property
    def name(self) -> str:
        """Names the data set in messages."""
        return self.source.name

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> ImageTextRecord:
        """Record `index`, or its substitute.

        Raises:
            RunError: more records cannot be read than allowed.
        """
        position = index
        generator = None
        for _ in range(_TRIES):
            if position not in self.bad:
                try:
                    return self.source[position]
                except DataError as error:
                    self._count(position, error)
            generator = generator or draw_generator(self.seed, 0, index, "substitute")
            position = int(generator.integers(len(self.source)))
        raise RunError(f"{self.name}: found no readable record in place of number {index}; {self.summary()}")

    def texts(self, indices: Sequence[int]) -> list[tuple[TextItem, ...]]:
        """The records' own texts, whether or not their pictures can be read, where the source knows them apart."""
        if isinstance(self.source, TextSource):
            return self.source.texts(indices)
        return [self[index].texts for index in indices]

    def check(self, limit: int | None = None) -> dict[int, str]:
        """Tries to read every record (or the first `limit`) and says which cannot be, and why; stops at nothing."""
        for position in range(min(len(self), limit or len(self))):
            try:
                self.source[position]
            except DataError as error:
                self.bad[position] = str(error)
        return dict(self.bad)

    def summary(self) -> str:
        """One line on what was skipped in this process."""
        if not self.bad:
            return "no record was skipped"
        return f"{len(self.bad)} of {counted(len(self), 'record')} skipped, such as {next(iter(self.bad.values()))}"

    def _count(self, position: int, error: DataError) -> None:
        self.bad[position] = str(error)
        _LOGGER.warning("skipped a record of %s: %s", self.name, error)
        if len(self.bad) > self.max_bad:
            raise RunError(
                f"{self.name}: too many records cannot be read, {len(self.bad)} so far, {self.max_bad} allowed "
                f"(data.max_bad, data.max_bad_fraction); the last: {error}"
            ) from error


def preview(source: ImageTextSource, opened: int = 200, texts: int = 4, *, captions_only: bool = False) -> list[str]:
    """Lines on a source: its first picture and its texts, and which of the first `opened` pictures cannot be read.

    Args:
        source: any source.
        opened: so many pictures are tried.
        texts: so many texts are shown.
        captions_only: leave out questions and their answers, which text to image is not trained on.
    """
    example = source[0]
    lines = []
    if isinstance(source, SkippingSource):
        source.check(opened)
        lines.append(source.summary())
    lines.append(f"first picture {example.id}: {example.image.shape[1]} x {example.image.shape[0]} px")
    shown = [item for item in example.texts if item.question is None or not captions_only][:texts]
    return lines + [
        f"  {item.kind}: {item.text!r}" if item.question is None else f"  {item.kind}: {item.question} -> {item.text!r}"
        for item in shown
    ]
