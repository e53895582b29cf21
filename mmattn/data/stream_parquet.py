"""Shards of Parquet, of which row groups are read whole, and a few kept in memory."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmattn.data.stream_shards import OpenFile, Row, Shard
from mmattn.errors import DataError

_ERRORS = (OSError, pa.ArrowException)


class RowGroupCache:
    """The row groups that were asked for last.

    Args:
        least: So many are always kept.
        rows: More than that are kept while they have at most so many rows together.

    Attributes:
        reads: How many were read from disk.
    """

    def __init__(self, least: int, rows: int) -> None:
        self.least, self.max_rows, self.reads = least, rows, 0
        self._tables: OrderedDict[Hashable, pa.Table] = OrderedDict()
        self.num_rows = 0

    def __len__(self) -> int:
        return len(self._tables)

    def get(self, key: Hashable, read: Callable[[], pa.Table]) -> pa.Table:
        """A row group, from memory or else by `read`."""
        table = self._tables.get(key)
        if table is None:
            table = read()
            self.reads += 1
            self._tables[key] = table
            self.num_rows += table.num_rows
            while len(self._tables) > self.least and self.num_rows > self.max_rows:
                _, oldest = self._tables.popitem(last=False)
                self.num_rows -= oldest.num_rows
        self._tables.move_to_end(key)
        return table

    def count(self, rows: np.ndarray) -> int:
        """How many would be kept of row groups with so many rows each, in that order."""
        return min(len(rows), max(self.least, int((np.cumsum(rows) <= self.max_rows).sum())))

    def __getstate__(self) -> dict[str, int]:
        return {"least": self.least, "rows": self.max_rows}

    def __setstate__(self, state: dict[str, int]) -> None:
        self.__init__(state["least"], state["rows"])


class ParquetShard(Shard):
    """A Parquet file.

    Args:
        path: The file.
        cache: Holds row groups of all shards.

    Raises:
        DataError: it is damaged, or no Parquet.
    """

    def __init__(self, path: Path, cache: RowGroupCache) -> None:
        super().__init__(path)
        self._cache = cache
        self._file = OpenFile(self)
        self._reader: pq.ParquetFile | None = None
        self._opened: object = None
        try:
            with pq.ParquetFile(path) as file:
                metadata = file.metadata
                groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
                self._names = file.schema_arrow.names
        except _ERRORS as error:
            raise DataError(f"{path}: cannot be read as Parquet ({_first_line(error)})") from error
        self._ends = np.cumsum([group.num_rows for group in groups], dtype=np.int64)
        self.group_bytes = np.array([group.total_byte_size for group in groups], dtype=np.int64)

    @property
    def num_rows(self) -> int:
        """Rows of the shard."""
        return int(self._ends[-1]) if len(self._ends) else 0

    @property
    def unit_starts(self) -> np.ndarray:
        """Where row groups start."""
        starts = np.append(np.int64(0), self._ends)[:-1]
        return starts[np.diff(np.append(starts, self.num_rows)) > 0]

    @property
    def group_rows(self) -> np.ndarray:
        """How many rows each row group has."""
        return np.diff(self._ends, prepend=0)

    def column_names(self) -> list[str]:
        """Those of the schema."""
        return list(self._names)

    def rows(self, numbers: Sequence[int], columns: Sequence[str] | None) -> list[Row]:
        """Rows by number."""
        found: dict[int, dict] = {}
        groups = np.searchsorted(self._ends, numbers, side="right")
        for group in np.unique(groups).tolist():
            wanted = [number for number, own in zip(numbers, groups, strict=True) if own == group]
            first = int(self._ends[group - 1]) if group else 0
            table = self._row_group(group, columns)
            places = pa.array([number - first for number in wanted], pa.int64())
            found.update(zip(wanted, table.take(places).to_pylist(), strict=True))
        return [(f"row {number + 1}", found[number]) for number in numbers]

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        self._reader = self._opened = None

    def _row_group(self, group: int, columns: Sequence[str] | None) -> pa.Table:
        names = None if columns is None else tuple(columns)
        return self._cache.get((str(self.path), group, names), lambda: self._read(group, columns))

    def _read(self, group: int, columns: Sequence[str] | None) -> pa.Table:
        file = self._file.get()
        try:
            if self._reader is None or self._opened is not file:
                self._reader, self._opened = pq.ParquetFile(file), file
            # No threads of its own: data workers are many already.
            return self._reader.read_row_group(
                group, columns=None if columns is None else list(columns), use_threads=False
            )
        except _ERRORS as error:
            self.require_unchanged()
            raise self.lost(f"row group {group + 1}: {_first_line(error)}") from error

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_reader": None, "_opened": None}


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
