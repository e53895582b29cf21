"""The shards of streamed data: which files they are, and what every kind of them can do."""

from __future__ import annotations

import hashlib
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mmattn.data.tables import named_files
from mmattn.data.whole_files import is_too_many_open, kept_array
from mmattn.errors import DataError, RunError

Row = tuple[str, dict[str, Any] | DataError]
"""Where a row is ("line 17"), and its columns or what is wrong with it."""

SUFFIXES = (".parquet", ".jsonl", ".ndjson", ".csv", ".tsv", ".tar")
_COMPRESSED = (".gz", ".tgz", ".bz2", ".xz", ".zst", ".zip")
_ENDS = 4096  # bytes at the start and at the end of a shard that tell it from another
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


class Shard(ABC):
    """One file of rows, which are numbered from 0. Opened in the process that reads it, when it first does.

    Args:
        path: The file.

    Raises:
        DataError: it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            status = path.stat()
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror})") from error
        self.size, self.mtime_ns = status.st_size, status.st_mtime_ns
        if not self.size:
            raise DataError(f"{path} is empty: 0 bytes; delete it, or write it again")

    @property
    @abstractmethod
    def num_rows(self) -> int:
        """Rows of the shard."""

    @property
    @abstractmethod
    def unit_starts(self) -> np.ndarray:
        """The rows at which that which is read at once begins, int64, the first of them 0; empty without rows."""

    @abstractmethod
    def column_names(self) -> list[str]:
        """The columns: all of the shard's, or those of its first row."""

    @abstractmethod
    def rows(self, numbers: Sequence[int], columns: Sequence[str] | None) -> list[Row]:
        """Rows by number; `columns` are those that are needed, None for all.

        Raises:
            RunError: the shard is gone, or not what it was.
        """

    @abstractmethod
    def close(self) -> None:
        """Let go of the open file, if there is one."""

    def fingerprint(self) -> str:
        """What tells the shard's content from another, wherever it lies: rows, size and a hash of both ends."""
        try:
            with open(self.path, "rb") as file:
                digest = hashlib.blake2b(file.read(_ENDS), digest_size=12)
                file.seek(max(0, self.size - _ENDS))
                digest.update(file.read(_ENDS))
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read ({error.strerror})") from error
        return f"{self.num_rows} rows, {self.size} bytes, {digest.hexdigest()}"

    @property
    def identity(self) -> list[Any]:
        """What tells this file from itself after a change: for what is kept of it."""
        return [str(self.path.resolve()), self.size, self.mtime_ns]

    def require_unchanged(self, descriptor: int | None = None) -> None:
        """Raise `RunError` when the file is gone or has another size or time of change than when it was indexed."""
        try:
            status = os.stat(self.path if descriptor is None else descriptor)
        except OSError as error:
            raise self.lost(error.strerror or str(error)) from error
        if (status.st_size, status.st_mtime_ns) != (self.size, self.mtime_ns):
            raise RunError(
                f"shard {self.path} has changed since this run started ({self.size:,} bytes then, "
                f"{status.st_size:,} now): put the old one back and continue with --resume, or start a new run"
            )

    def lost(self, reason: str) -> RunError:
        """The error for a shard that cannot be read any more."""
        return RunError(
            f"shard {self.path} cannot be read any more ({reason}): put it back, and continue with --resume"
        )


class IndexedShard(Shard):
    """A shard of which it is known where each row starts, and where its last row ends.

    That stands in a file, an index, which is mapped while the shard is in use: only the number of rows is in memory.

    Args:
        path: The file.
        index_folder: Where its index is kept.
        form: What decides the index beside the file, as JSON values.

    Attributes:
        unit: rows that are kept together: any row can be read alone, but neighbours cost less.
        no_columns: what to say when none of the first rows can be read.

    Raises:
        DataError: the file cannot be read.
        RunError: its index cannot be written or read.
    """

    unit: int
    no_columns: str

    def __init__(self, path: Path, index_folder: Path, form: Sequence[Any]) -> None:
        super().__init__(path)
        self._file = OpenFile(self)
        self._folder, self._key = index_folder, [*form, *self.identity]
        self._mapped: np.ndarray | None = None
        self._num_rows = self._count(self._index())
        self.close()

    @abstractmethod
    def _write_index(self, file: BinaryIO) -> None:
        """Write int64 numbers."""

    @abstractmethod
    def _count(self, index: np.ndarray) -> int:
        """How many rows an index is of."""

    @property
    @abstractmethod
    def _starts(self) -> np.ndarray:
        """Where rows start, and where the last one ends: int64 [num_rows + 1], in bytes."""

    def _index(self) -> np.ndarray:
        if self._mapped is None:
            kept = kept_array(self._folder, self._key, self._write_unchanged, np.int64, "data.index_folder")
            self._mapped = np.asarray(kept)  # of which a slice takes a tenth of the time
        return self._mapped

    def _write_unchanged(self, file: BinaryIO) -> None:
        """An index of the file that the key names, also where it is made anew while a run reads the shard."""
        self.require_unchanged()
        self._write_index(file)
        self.require_unchanged()

    def close(self) -> None:
        """Let go of the open file and of the mapped index."""
        self._file.close()
        self._mapped = None

    @property
    def num_rows(self) -> int:
        """Rows of the shard."""
        return self._num_rows

    @property
    def unit_starts(self) -> np.ndarray:
        """Every `unit`-th row."""
        return np.arange(0, self.num_rows, self.unit)

    def column_names(self) -> list[str]:
        """Those of the first row that can be read."""
        for number in range(min(self.num_rows, self.unit)):
            row = self.rows([number], None)[0][1]
            if isinstance(row, dict):
                return list(row)
        raise DataError(f"{self.path}: {self.no_columns}")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_mapped": None}


class OpenFile:
    """A shard's file, opened where it is first read: neither forked nor pickled."""

    def __init__(self, shard: Shard) -> None:
        self.shard = shard
        self._file: BinaryIO | None = None
        self._process = 0

    def get(self) -> BinaryIO:
        """The open file of this process.

        Raises:
            RunError: it is gone or has changed.
        """
        if self._file is None or self._process != os.getpid():
            try:
                file = open(self.shard.path, "rb")  # noqa: SIM115 (closed by `close`)
            except OSError as error:
                if is_too_many_open(error):
                    raise RunError(
                        f"shard {self.shard.path} cannot be opened ({error.strerror}): allow more (ulimit -n), or "
                        "mix fewer shards at once (data.blocks_at_once)"
                    ) from error
                raise self.shard.lost(error.strerror or str(error)) from error
            self.shard.require_unchanged(file.fileno())
            self._file, self._process = file, os.getpid()
        return self._file

    def read(self, start: int, size: int) -> bytes:
        """Bytes of the file.

        Raises:
            RunError: they are not there.
        """
        file = self.get()
        try:
            file.seek(start)
            data = file.read(size)
        except OSError as error:
            raise self.shard.lost(error.strerror or str(error)) from error
        if len(data) < size:
            self.shard.require_unchanged(file.fileno())
            raise self.shard.lost(f"{size:,} bytes are wanted at {start:,}, {len(data):,} are there")
        return data

    def close(self) -> None:
        """Close it, in the process that opened it."""
        if self._file is not None and self._process == os.getpid():
            self._file.close()
        self._file = None

    def __getstate__(self) -> dict[str, Any]:
        return {"shard": self.shard, "_file": None, "_process": 0}


def find_shards(paths: Sequence[str]) -> list[Path]:
    """The files that paths, globs, folders and ranges such as part-{000..127}.tar mean.

    Those of one entry come sorted by name, entries in their order.

    Raises:
        DataError: nothing there, a file twice, of a kind that cannot be streamed, or of several kinds.
    """
    found: list[Path] = []
    for entry in paths:
        if "://" in entry:
            raise DataError(f"{entry} is an address, and shards are read from local files: download them first")
        for path in _expanded(entry):
            found += _files(path)
    twice = {path for path in found if found.count(path) > 1} if len(set(found)) < len(found) else set()
    if twice:
        raise DataError(f"{min(twice)} is named twice in data.shards")
    kinds = sorted({_kind(path) for path in found})
    if len(kinds) > 1:
        raise DataError(f"shards of several kinds ({', '.join(kinds)}): give data.path or data.shards of one kind")
    return found


def shard_names(paths: Sequence[Path]) -> list[str]:
    """Short names: paths from the folder on that holds all of them."""
    root = os.path.commonpath([path.absolute().parent for path in paths])
    return [path.absolute().relative_to(root).as_posix() for path in paths]


def _expanded(entry: str) -> list[str]:
    match = _RANGE.search(entry)
    if match is None:
        return [entry]
    first, last = match.groups()
    numbers = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    if not numbers:
        raise DataError(f"{entry}: the range {match.group()} is empty")
    return [path for number in numbers for path in _expanded(entry[: match.start()] + number + entry[match.end() :])]


def _files(entry: str) -> list[Path]:
    path = Path(entry)
    if path.is_dir():
        files = [file for file in sorted(path.rglob("*")) if file.suffix.lower() in SUFFIXES and file.is_file()]
        files = [file for file in files if not any(part.startswith(".") for part in file.relative_to(path).parts)]
        if not files:
            raise DataError(f"{entry} holds no shards: files that end in {', '.join(SUFFIXES)}")
        return files
    files = [Path(name) for name in named_files(entry)]
    if not files or not files[0].is_file():
        raise DataError(f"{entry}: no such file; set data.path or data.shards to shards")
    for file in files:
        _kind(file)
    return files


def _kind(path: Path) -> str:
    suffix = path.suffix.lower()
    if suffix in _COMPRESSED:
        raise DataError(
            f"{path} is compressed, and could only be read from its start on: decompress it, or write it as Parquet, "
            "which is compressed inside"
        )
    if suffix not in SUFFIXES:
        advice = ", such as JSON lines (.jsonl)" if suffix == ".json" else ""
        raise DataError(f"{path}: shards of kind {suffix!r} cannot be streamed: use {', '.join(SUFFIXES)}{advice}")
    return suffix
