"""Shards in webdataset's form: tars in which the files of an example follow one another and share the name before the
first dot.

    00012.jpg  00012.txt  00013.jpg  00013.json ...
"""

from __future__ import annotations

import json
import tarfile
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mmattn.data.stream_shards import IndexedShard, Row
from mmattn.errors import DataError

_FORMAT = 1
_TEXTS = ("txt", "text", "caption", "cls")
PICTURES = ("jpg", "jpeg", "png", "webp")


class TarShard(IndexedShard):
    """A tar of examples. A row has a column for each file, called by what follows the first dot of its name: bytes,
    but text for txt, text, caption and cls. What a json file holds is put in as columns of their own.

    Args:
        path: The file, not compressed.
        index_folder: Where its index is kept.

    Raises:
        DataError: it is damaged, no tar, or holds a file without an ending.
    """

    unit = 10
    no_columns = "none of the first examples can be read"

    def __init__(self, path: Path, index_folder: Path) -> None:
        super().__init__(path, index_folder, ["tar", _FORMAT])

    def rows(self, numbers: Sequence[int], columns: Sequence[str] | None) -> list[Row]:
        """Examples by number; pictures are left out where `columns` names none."""
        return [self._row(number, columns) for number in numbers]

    @property
    def _starts(self) -> np.ndarray:
        return self._index()

    def _count(self, index: np.ndarray) -> int:
        return len(index) - 1

    def _row(self, number: int, columns: Sequence[str] | None) -> Row:
        file = self._file.get()
        start, end = int(self._starts[number]), int(self._starts[number + 1])
        has_pictures = columns is None or any(column in PICTURES for column in columns)
        row: dict[str, Any] = {}
        met: set[str] = set()
        place, problem = f"example {number + 1}", None
        self.require_unchanged(file.fileno())  # tarfile takes what is cut off for the end
        try:
            file.seek(start)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in _members(tar):
                    if member.offset >= end:
                        break
                    key, column = _split(member.name)
                    place = f"example {number + 1} ({key})"
                    if column in met:
                        problem = problem or DataError(f"two files {column!r}")
                    elif has_pictures or column not in PICTURES:
                        content = tar.extractfile(member)
                        data = content.read() if content is not None else b""
                        if len(data) < member.size:
                            raise tarfile.ReadError(f"{member.name} is cut short")
                        problem = _add(row, column, data) or problem
                    met.add(column)
        except (OSError, tarfile.TarError) as error:
            self.require_unchanged()
            raise self.lost(f"{place}: {error}") from error
        return place, problem or row

    def _write_index(self, file: BinaryIO) -> None:
        """Where each example starts, and where the last one ends."""
        starts = array("q")
        end = mark = 0
        last = None
        try:
            with tarfile.open(self.path, mode="r:") as tar:
                for member in _members(tar):
                    key, column = _split(member.name)
                    if not column:
                        raise DataError(f"{self.path}: {member.name} has no ending that says what it holds")
                    if key != last:
                        starts.append(member.offset)
                        last = key
                    end = _next_header(tar)
                mark = _next_header(tar)  # files that belong to no example may follow the last one
        except (OSError, tarfile.TarError) as error:
            raise DataError(f"{self.path}: cannot be read as a tar ({error})") from error
        with open(self.path, "rb") as whole:  # tarfile takes a header that is cut short for the end
            whole.seek(mark)
            if whole.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise DataError(f"{self.path}: the tar is cut short or damaged: no end mark at byte {mark:,}")
        starts.append(end)
        file.write(starts.tobytes())


def _members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The files of a tar. tarfile remembers every member, which a large tar has too many of."""
    while (member := tar.next()) is not None:
        tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue] (missing in typeshed)
        name = member.name.rsplit("/", 1)[-1]
        if member.isfile() and not (name.startswith("__") and name.endswith("__")):
            yield member


def _next_header(tar: tarfile.TarFile) -> int:
    return tar.offset  # behind the content of the last member as it is stored, which of a sparse one is not its size


def _split(name: str) -> tuple[str, str]:
    """The key of a file in a tar, and what it is in its example."""
    folder, slash, base = name.rpartition("/")
    key, _, column = base.partition(".")
    return f"{folder}{slash}{key}", column.lower()


def _add(row: dict[str, Any], column: str, data: bytes) -> DataError | None:
    """Put a file into a row; what is wrong with it."""
    if column != "json" and column not in _TEXTS:
        row[column] = data
        return None
    try:
        text = data.decode()
        if column != "json":
            row[column] = text.strip()
            return None
        values = json.loads(text)
    except ValueError as error:
        return DataError(f"its {column} cannot be read ({error})")
    if not isinstance(values, dict):
        return DataError("its json is a JSON value, but no object")
    for name, value in values.items():
        row.setdefault(name, value)
    return None
