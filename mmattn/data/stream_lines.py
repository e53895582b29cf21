"""Shards of JSON lines, CSV and TSV: where each row starts is found in one pass, and kept on disk."""

from __future__ import annotations

import csv
import io
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mmattn.data.stream_shards import IndexedShard, Row
from mmattn.data.text_rows import decoded_line, delimited_row, header_names, json_row
from mmattn.errors import DataError

_FORMAT = 2
_AT_ONCE = 65_536
_BOM = b"\xef\xbb\xbf"


class LineShard(IndexedShard):
    """A file of JSON lines, or of CSV or TSV rows, which may span lines where they are quoted.

    Args:
        path: The file.
        index_folder: Where its index is kept.
        header: Of CSV and TSV: whether the first row names the columns; else they are called 1, 2, 3.
        quoting: Of CSV and TSV: whether quote marks around a field hold it together, or are text.

    Raises:
        DataError: it cannot be read, or is no table.
    """

    unit = 100
    no_columns = "none of the first lines holds a JSON object"

    def __init__(self, path: Path, index_folder: Path, *, header: bool = True, quoting: bool = True) -> None:
        self.delimiter = {".csv": ",", ".tsv": "\t"}.get(path.suffix.lower())
        self.header, self.quoting = header, quoting
        self._names: list[str] | None = None
        form = ["json"] if self.delimiter is None else [self.delimiter, header, quoting]
        super().__init__(path, index_folder, ["lines", _FORMAT, *form])

    def column_names(self) -> list[str]:
        """Those of the header, or of the first row that can be read."""
        return super().column_names() if self.delimiter is None else self._header()

    def rows(self, numbers: Sequence[int], columns: Sequence[str] | None) -> list[Row]:
        """Rows by number, with all columns."""
        return [(f"line {self._line(number)}", self._row(number)) for number in numbers]

    @property
    def _starts(self) -> np.ndarray:
        return self._index()[2 : self.num_rows + 3]

    @property
    def _gaps(self) -> np.ndarray:
        """From which row on how many lines stand between rows, int64 [changes, 2]."""
        return self._index()[self.num_rows + 3 :].reshape(-1, 2)

    def _count(self, index: np.ndarray) -> int:
        return int(index[0])

    def _row(self, number: int) -> dict[str, Any] | DataError:
        start, end = self._starts[number : number + 2].tolist()
        data = self._file.read(start, end - start)
        if self.delimiter is not None:
            return delimited_row(self._header(), data, self.delimiter, quoting=self.quoting)
        line = decoded_line(1 if start == 0 else 2, data.partition(b"\n")[0])  # empty lines may follow
        return json_row(line) if isinstance(line, str) else line

    def _header(self) -> list[str]:
        if self._names is None:
            if not (self.header or self.num_rows):
                raise DataError(f"{self.path} has no rows, which would say how many columns there are: delete it")
            starts = self._starts
            end = int(starts[0]) if self.header else int(starts[1])
            data = self._file.read(0, end).removeprefix(_BOM)
            fields = header_names(self.path, data, str(self.delimiter), quoting=self.quoting)
            self._names = fields if self.header else [str(number + 1) for number in range(len(fields))]
        return self._names

    def _line(self, number: int) -> int:
        gaps = self._gaps
        place = int(np.searchsorted(gaps[:, 0], number, side="right")) - 1
        return number + 1 + (int(gaps[place, 1]) if place >= 0 else 0)

    def _write_index(self, file: BinaryIO) -> None:
        """Two counts, `_starts`, and `_gaps`."""
        file.write(np.zeros(2, dtype=np.int64).tobytes())
        gaps, starts, rows, extra = array("q"), array("q"), 0, 0
        try:
            found = self._json_starts() if self.delimiter is None else self._delimited_starts()
            for start, line in found:
                if line - rows - 1 != extra:
                    extra = line - rows - 1
                    gaps.extend((rows, extra))
                starts.append(start)
                rows += 1
                if len(starts) == _AT_ONCE:
                    file.write(starts.tobytes())
                    del starts[:]
        except OSError as error:
            if error.filename is None and error.errno is not None:
                raise
            raise DataError(f"{self.path}: cannot be read ({error.strerror})") from error
        starts.append(self.size)
        file.write(starts.tobytes())
        file.write(gaps.tobytes())
        file.seek(0)
        file.write(np.array([rows, len(gaps) // 2], dtype=np.int64).tobytes())

    def _json_starts(self) -> Iterator[tuple[int, int]]:
        start = 0
        with open(self.path, "rb") as file:
            for line, raw in enumerate(file, 1):
                if not (raw.isspace() or raw == _BOM):
                    yield start, line
                start += len(raw)

    def _delimited_starts(self) -> Iterator[tuple[int, int]]:
        place = _Place()
        options: dict[str, Any] = {} if self.quoting else {"quoting": csv.QUOTE_NONE}
        with open(self.path, encoding="utf-8", errors="surrogateescape", newline="") as file:
            reader = csv.reader(place.lines(file), delimiter=str(self.delimiter), **options)
            is_header = self.header
            start, line = 0, 1
            try:
                for fields in reader:
                    if fields and not is_header:
                        yield start, line
                    is_header = is_header and not fields
                    start, line = place.end, reader.line_num + 1
            except csv.Error as error:
                raise DataError(
                    f"{self.path} line {reader.line_num}: not readable as a table ({error}); {self._advice(line)}"
                ) from error

    def _advice(self, line: int) -> str:
        """On a field that is too large, which is all that the csv module refuses in lines cut as it wants them."""
        if self.quoting:  # a quote mark that never closes swallows lines until then
            return (
                f"the row starts at line {line}: close its quote mark, or if quote marks are text there, set "
                "data.quoting=false, or write the shard as JSON lines"
            )
        return "is that the right delimiter (.csv: comma, .tsv: tab)? Else write the shard as JSON lines"


class _Place:
    """How far a file has been read, in bytes, line by line as the csv module wants them: a lone \\r ends one too."""

    def __init__(self) -> None:
        self.end = 0

    def lines(self, file: io.TextIOBase) -> Iterator[str]:
        for line in file:
            is_first = not self.end
            self.end += len(line) if line.isascii() else len(line.encode(errors="surrogateescape"))
            yield line.removeprefix("\ufeff") if is_first else line
