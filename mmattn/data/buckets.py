"""Aspect buckets: pictures keep their shape about, and those of one shape share batches.

The scheme is the one that NovelAI described in 2022 and that fine-tuning tools use since: sides are multiples of a
step, areas at most that of the square, and each picture goes where the ratio of its sides is nearest.
"""

from __future__ import annotations

import contextlib
import functools
import io
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from mmattn.data.captions import CheckedSource, checked_source, require_captions
from mmattn.data.counted import counted
from mmattn.data.picture_fit import PictureConfig, require_large_enough
from mmattn.data.records import ImageTextRecord, ImageTextSource
from mmattn.data.scenes import SceneDataset
from mmattn.data.skipping import SkippingSource
from mmattn.data.tables import TableSource
from mmattn.errors import DataError

Size = tuple[int, int]
"""Height and width in pixels."""

_ORIENTATION, _ON_ITS_SIDE = 0x0112, (5, 6, 7, 8)  # of EXIF
_HEADER_ERRORS = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, DataError)


def bucket_sizes(config: PictureConfig) -> list[Size]:
    """Every (height, width) that pictures may get, from wide to tall; with `buckets` off the square alone."""
    if not config.buckets:
        return [(config.resolution, config.resolution)]
    area, step = config.resolution**2, config.step
    sizes = {(config.resolution, config.resolution)}
    for width in range(config.resolution, int(config.resolution * config.max_aspect) + 1, step):
        height = area // width // step * step
        if height and width <= height * config.max_aspect:
            sizes |= {(height, width), (width, height)}
    return sorted(sizes, key=lambda size: (size[0] / size[1], size))


def nearest_size(original: Size, sizes: Sequence[Size]) -> int:
    """Which of `sizes` has the ratio of sides nearest to that of a picture (by its logarithm)."""
    ratios = _log_ratios(tuple(sizes))
    distances = np.abs(ratios - np.log(original[0] / original[1]))
    # Of equally near ones the largest, and of these the first: rounding must not choose.
    areas = np.array([height * width for height, width in sizes])
    near = np.flatnonzero(distances <= distances.min() + 1e-9)
    return int(near[np.argmax(areas[near])])


@functools.lru_cache(maxsize=64)
def _log_ratios(sizes: tuple[Size, ...]) -> np.ndarray:
    return np.log([height / width for height, width in sizes])


def usable_source(source: ImageTextSource, config: PictureConfig) -> ImageTextSource:
    """The source without records that cannot be learned from: too small a picture, or no caption.

    Where unreadable records are skipped and counted (`SkippingSource`), so are these; elsewhere reading one raises
    `DataError`.
    """
    return checked_source(source, _Check(config, tuple(bucket_sizes(config))))


@dataclass(frozen=True)
class _Check:
    config: PictureConfig
    sizes: tuple[Size, ...]

    def __call__(self, record: ImageTextRecord) -> None:
        require_captions(record.id, record.texts)
        self.require_large_enough(record.id, (record.image.shape[0], record.image.shape[1]))

    def require_large_enough(self, name: str, original: Size) -> None:
        target = self.sizes[nearest_size(original, self.sizes)]
        require_large_enough(name, original, target, self.config)


@dataclass(frozen=True, eq=False)
class Buckets:
    """Which bucket each example is in.

    Attributes:
        sizes: (height, width) of each bucket that holds pictures.
        groups: Bucket of each example, int64 [num_examples]: `Task.groups`.
    """

    sizes: list[Size]
    groups: np.ndarray

    @property
    def example_sizes(self) -> np.ndarray:
        """Height and width of each example, int64 [num_examples, 2]: `TextToImageCollator(sizes=...)`."""
        return np.array(self.sizes, dtype=np.int64)[self.groups]

    def describe(self) -> str:
        """One line: each bucket's width, height and number of pictures."""
        counts = np.bincount(self.groups, minlength=len(self.sizes))
        parts = [f"{width} x {height}: {count:,}" for (height, width), count in zip(self.sizes, counts, strict=True)]
        return f"{counted(len(parts), 'bucket')} ({', '.join(parts)})"


def assign_buckets(originals: np.ndarray, config: PictureConfig, *, min_examples: int = 1) -> Buckets:
    """The bucket of each picture.

    Args:
        originals: Height and width of each picture, int [num_examples, 2], from `picture_sizes`.
        config: Says which buckets there are.
        min_examples: Buckets with fewer pictures are given up, the smallest first, and their pictures go to the
            nearest that remains: a batch of one bucket should not show the same picture several times. The batch size
            is a good choice.
    """
    if not len(originals):
        raise DataError("there are no pictures to put into buckets")
    sizes = bucket_sizes(config)
    shapes = Counter((int(height), int(width)) for height, width in originals)
    while True:
        nearest = {shape: nearest_size(shape, sizes) for shape in shapes}
        counts = np.zeros(len(sizes), dtype=np.int64)
        for shape, count in shapes.items():
            counts[nearest[shape]] += count
        scarce = [index for index in range(len(sizes)) if counts[index] < min_examples]
        if not scarce or len(sizes) == 1:
            break
        empty = {index for index in scarce if counts[index] == 0}
        given_up = empty or {min(scarce, key=lambda index: counts[index])}
        sizes = [size for index, size in enumerate(sizes) if index not in given_up]
    groups = [nearest[(int(height), int(width))] for height, width in originals]
    return Buckets(sizes, np.array(groups, dtype=np.int64))


def picture_sizes(source: ImageTextSource, config: PictureConfig) -> np.ndarray:
    """Height and width of every picture of a source, int64 [num_examples, 2].

    Files are asked for their header only; other pictures are opened once. A picture that cannot be used is replaced by
    its substitute, whose size is given.

    Raises:
        DataError, RunError: as reading the source does.
    """
    if isinstance(_innermost(source), SceneDataset):
        side = _innermost(source).image_size  # pyright: ignore[reportAttributeAccessIssue]
        return np.full((len(source), 2), side, dtype=np.int64)
    check = _Check(config, tuple(bucket_sizes(config)))
    sizes = np.empty((len(source), 2), dtype=np.int64)
    # tqdm leaves a bar out by itself, with None, where there is no terminal.
    for index in tqdm(range(len(source)), desc="picture sizes", unit="picture", disable=None):
        sizes[index] = _header_size(source, index, check) or source[index].image.shape[:2]
    return sizes


def _innermost(source: ImageTextSource) -> ImageTextSource:
    while isinstance(source, SkippingSource | CheckedSource):
        source = source.source
    return source


def _header_size(source: ImageTextSource, index: int, check: _Check) -> Size | None:
    """A picture's size from its file's first bytes; None where it has to be opened."""
    table = _innermost(source)
    if not isinstance(table, TableSource):
        return None
    row = table.rows[index][0]
    with contextlib.suppress(*_HEADER_ERRORS):  # opening it says what is wrong, and counts it
        label, where = table.picture(row)
        size = header_size(where)
        check.require_large_enough(label, size)
        return size
    return None


def header_size(source: Path | bytes) -> Size:
    """Height and width of a picture as it is shown (EXIF rotation applied), without decoding it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            on_its_side = image.getexif().get(_ORIENTATION) in _ON_ITS_SIDE
            return (image.width, image.height) if on_its_side else (image.height, image.width)
