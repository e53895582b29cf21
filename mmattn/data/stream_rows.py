"""Rows of many shards under one numbering, read when they are asked for: nothing is kept for each row in memory."""

from __future__ import annotations

import hashlib
import logging
import math
import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from mmattn.data.stream_lines import LineShard
from mmattn.data.stream_parquet import ParquetShard, RowGroupCache
from mmattn.data.stream_shards import Row, Shard, find_shards, shard_names
from mmattn.data.stream_spec import StreamSettings
from mmattn.data.stream_tar import TarShard
from mmattn.data.tables import missing_column
from mmattn.errors import DataError

_LOGGER = logging.getLogger(__name__)
_SAMPLE_RUNS = 64


@dataclass(frozen=True, eq=False)
class ShardLayout:
    """How the rows lie, which decides the order in which training draws them.

    Attributes:
        bounds: Rows at which that which is read at once begins, int64 [units + 1], from 0 to the number of rows.
        window: Rows that are shuffled together.
        blocks_at_once: How many places of the data a window mixes.
        shards: The shards by name, in their order, with a fingerprint of each.
    """

    bounds: np.ndarray
    window: int
    blocks_at_once: int
    shards: Mapping[str, str]

    def fingerprint(self) -> str:
        """Of all shards: the same wherever they lie."""
        return hashlib.sha256(repr((int(self.bounds[-1]), list(self.shards.items()))).encode()).hexdigest()


class StreamedRows:
    """All rows of the shards that settings name.

    Args:
        settings: Where the shards are, and how they are shuffled.
        limit: Use only so many rows, the first.
        paths: Other shards than those of `settings`.
        header, quoting: See `LineShard`.

    Raises:
        DataError: shards that are missing, damaged, empty or of several kinds.
    """

    def __init__(
        self,
        settings: StreamSettings,
        *,
        limit: int | None = None,
        paths: Sequence[str] | None = None,
        header: bool = True,
        quoting: bool = True,
    ) -> None:
        entries = list(paths) if paths is not None else settings.shard_paths
        self.name = entries[0] if len(entries) == 1 else f"{entries[0]} and {len(entries) - 1} more"
        self.cache = RowGroupCache(settings.blocks_at_once, 2 * settings.window)
        files, folder = find_shards(entries), _index_folder(settings)
        # tqdm leaves a bar out by itself, with None, where there is no terminal.
        bar = tqdm(files, desc="indexing shards", unit="shard", disable=None)
        self.shards = [self._open(path, folder, header=header, quoting=quoting) for path in bar]
        self.index_folder = folder
        counts = [shard.num_rows for shard in self.shards]
        self._starts = np.append(0, np.cumsum(counts, dtype=np.int64))
        size = int(self._starts[-1])
        if not size:
            raise DataError(f"{self.name} is empty: no rows in {len(files)} shards")
        self.size = size if limit is None else min(size, limit)
        self.layout = self._layout(files, settings)
        self._most_open = 2 * settings.blocks_at_once
        self._used: OrderedDict[int, None] = OrderedDict()
        _LOGGER.info("%s", self.describe())

    @property
    def is_tar(self) -> bool:
        """Whether rows are the files of an example in a tar."""
        return isinstance(self.shards[0], TarShard)

    def __len__(self) -> int:
        return self.size

    def rows(self, indices: Sequence[int], columns: Sequence[str] | None = None) -> list[Row]:
        """Rows by number, with what names each: its shard and its place there.

        Args:
            indices: Which.
            columns: Those that are needed; others may be left out. None: all.

        Raises:
            RunError: a shard is gone, or not what it was.
        """
        numbers = np.asarray(indices, dtype=np.int64)
        if len(numbers) and not (numbers.min() >= 0 and numbers.max() < self.size):
            raise IndexError(f"{self.name} has {self.size} rows, no number {numbers.max()} or {numbers.min()}")
        of_shard = np.searchsorted(self._starts, numbers, side="right") - 1
        found: dict[int, Row] = {}
        for number in np.unique(of_shard).tolist():
            places = np.flatnonzero(of_shard == number)
            shard = self._used_shard(number)
            local = (numbers[places] - self._starts[number]).tolist()
            for place, (where, row) in zip(places.tolist(), shard.rows(local, columns), strict=True):
                found[place] = (f"{shard.path} {where}", row)
        return [found[place] for place in range(len(numbers))]

    def shard_of(self, index: int) -> Path:
        """The file that holds a row."""
        return self.shards[int(np.searchsorted(self._starts, index, side="right")) - 1].path

    def column_names(self) -> list[str]:
        """The columns of the first shard that holds rows: of files without a schema those of its first row."""
        return next(shard for shard in self.shards if shard.num_rows).column_names()

    def require_columns(self, used: Mapping[str, str | None]) -> None:
        """Raise `DataError` where a shard lacks one of `used`, columns by their key under `data.columns`."""
        has_schema = isinstance(self.shards[0], ParquetShard) or self.shards[0].path.suffix.lower() in (".csv", ".tsv")
        for shard in self.shards if has_schema else self.shards[:0]:
            if not shard.num_rows:
                continue
            _require(str(shard.path), used, shard.column_names())
            shard.close()
        if not has_schema:
            _require(self.name, used, self.column_names())

    def describe(self) -> str:
        """One line: how many rows and shards, and for Parquet what stays in memory."""
        text = f"{self.name}: {self.size:,} rows in {len(self.shards):,} shards"
        shards = [shard for shard in self.shards if isinstance(shard, ParquetShard)]
        if not shards:
            return text
        rows = np.concatenate([shard.group_rows for shard in shards])
        is_read = np.cumsum(rows) - rows < self.size
        rows, sizes = rows[is_read], np.concatenate([shard.group_bytes for shard in shards])[is_read]
        largest = np.argsort(sizes)[::-1]
        count = self.cache.count(rows[largest])
        size = math.ceil(sizes[largest[:count]].sum() / 2**20)
        return f"{text}; each data worker keeps up to about {count:,} row groups in memory, of about {size:,} MiB"

    def _open(self, path: Path, folder: Path, *, header: bool, quoting: bool) -> Shard:
        suffix = path.suffix.lower()
        if suffix == ".parquet":
            return ParquetShard(path, self.cache)
        if suffix == ".tar":
            return TarShard(path, folder)
        return LineShard(path, folder, header=header, quoting=quoting)

    def _layout(self, files: Sequence[Path], settings: StreamSettings) -> ShardLayout:
        units = [start + shard.unit_starts for start, shard in zip(self._starts.tolist(), self.shards, strict=False)]
        bounds = np.concatenate(units)
        bounds = np.append(bounds[bounds < self.size], np.int64(self.size))
        shards = {name: shard.fingerprint() for name, shard in zip(shard_names(files), self.shards, strict=True)}
        return ShardLayout(bounds, settings.window, settings.blocks_at_once, shards)

    def _used_shard(self, number: int) -> Shard:
        """A shard, after closing the one that was not used for longest where many are open."""
        self._used[number] = None
        self._used.move_to_end(number)
        while len(self._used) > self._most_open:
            self.shards[self._used.popitem(last=False)[0]].close()
        return self.shards[number]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_used": OrderedDict()}


def stream_layout(source: object) -> ShardLayout | None:
    """The layout of a source that is read from shards, through whatever checks and skips its records; else None."""
    while source is not None:
        if isinstance(rows := getattr(source, "streamed_rows", None), StreamedRows):
            return rows.layout
        source = getattr(source, "source", None)
    return None


def sample_numbers(source: Sized, limit: int, otherwise: Sequence[int] | np.ndarray) -> list[int]:
    """Which records of a source stand for all of them: of a streamed one runs from all over the data, of at most
    `limit` records together, so that little has to be read; of another one `otherwise`.
    """
    if stream_layout(source) is None:
        return list(map(int, otherwise))
    size = len(source)
    if size <= limit:
        return list(range(size))
    length = -(-limit // _SAMPLE_RUNS)
    starts = np.linspace(0, size - length, limit // length).astype(np.int64)
    return np.unique(starts[:, None] + np.arange(length)).tolist()


def _require(name: str, used: Mapping[str, str | None], present: Sequence[str]) -> None:
    for role, column in used.items():
        if column is not None and column not in present:
            raise DataError(missing_column(name, role, column, present))


def _index_folder(settings: StreamSettings) -> Path:
    if settings.index_folder is not None:
        return Path(settings.index_folder)
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "mmattn" / "shards"
