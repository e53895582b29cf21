"""Rows of text files, line by line, so that one damaged line costs no more than itself and is named by its number."""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mmattn.errors import DataError

_BOM = b"\xef\xbb\xbf"


def numbered_lines(path: str | Path) -> Iterator[tuple[int, str | DataError]]:
    """(number, line) for each line of a UTF-8 file, numbered from 1, without its end.

    Only `\\n` and `\\r\\n` end a line: other tools' reading of U+2028 and the like moves all lines that follow. A line
    that is not UTF-8 comes as a `DataError` that says so.

    Raises:
        DataError: no such file.
    """
    require_file(path)
    with open(path, "rb") as file:
        for number, raw in enumerate(file, 1):
            yield number, decoded_line(number, raw)


def decoded_line(number: int, raw: bytes) -> str | DataError:
    """Line `number` (from 1) of a UTF-8 file without its end, or what is wrong with it."""
    line = raw.removeprefix(_BOM) if number == 1 else raw
    try:
        return line.removesuffix(b"\n").removesuffix(b"\r").decode()
    except UnicodeDecodeError as error:
        return DataError(_not_utf8(line[error.start]))


def require_file(path: str | Path) -> None:
    """Raises `DataError` when there is no such file, or nothing in it."""
    if not Path(path).is_file():
        kind = "is a folder, not a file" if Path(path).is_dir() else "no such file"
        raise DataError(f"{path}: {kind}")
    if not Path(path).stat().st_size:
        raise DataError(f"{path} is empty: no lines")


def aligned_lines(
    source_path: str | Path, target_path: str | Path
) -> Iterator[tuple[int, str | DataError, str | DataError]]:
    """(number, source line, target line) of two files of which line n translates line n.

    Raises:
        DataError: a file that is missing or empty; at the end, files of different length.
    """
    require_file(target_path)
    counts = [0, 0]
    lines = itertools.zip_longest(numbered_lines(source_path), numbered_lines(target_path))
    for source, target in lines:
        counts[0] += source is not None
        counts[1] += target is not None
        if source is not None and target is not None:
            yield source[0], source[1], target[1]
    if counts[0] != counts[1]:
        raise DataError(
            f"{source_path} has {counts[0]:,} lines and {target_path} has {counts[1]:,}: they are no translations of "
            "each other line by line; find where they part, or give the pairs as a table"
        )


def json_rows(path: str | Path) -> Iterator[tuple[int, dict[str, Any] | DataError]]:
    """(number, row) for each line of a JSONL file; a line that is no JSON object comes as a `DataError`."""
    for number, line in numbered_lines(path):
        if isinstance(line, str):
            if not line.strip():
                continue
            yield number, json_row(line)
        else:
            yield number, line


def json_row(line: str) -> dict[str, Any] | DataError:
    """A line of a JSONL file, or what is wrong with it."""
    try:
        row = json.loads(line)
    except ValueError as error:
        return DataError(f"not JSON ({error})")
    return row if isinstance(row, dict) else DataError("a JSON value, but no object")


def has_half_surrogate(text: str) -> bool:
    """Whether a text, from JSON that was cut or written wrongly, holds what is no character and cannot be encoded."""
    return not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text)


def delimited_rows(
    path: str | Path, delimiter: str, *, header: bool = True, quoting: bool = True
) -> Iterator[tuple[int, dict[str, Any] | DataError]]:
    """(number of the last line, row) for each row of a CSV or TSV file; a damaged row comes as a `DataError`.

    Args:
        path: The file.
        delimiter: Between fields.
        header: Whether the first row names the columns; else they are called 1, 2, 3.
        quoting: Whether quote marks around a field hold it together, or are text.

    Raises:
        DataError: no such file, nothing in it, or a quote mark that swallows the file.
    """
    require_file(path)
    # Undecodable bytes become lone surrogates, which no valid text holds, so that other rows are not lost.
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        options: dict[str, Any] = {} if quoting else {"quoting": csv.QUOTE_NONE}
        reader = csv.reader(file, delimiter=delimiter, **options)
        names: list[str] | None = None
        try:
            for fields in reader:
                if names is None and fields:
                    names = fields if header else [str(number + 1) for number in range(len(fields))]
                    if header:
                        _check_header(path, reader.line_num, names)
                        continue
                if names is not None and fields:
                    yield reader.line_num, _row(names, fields)
        except csv.Error as error:  # a quote mark that never closes swallows lines until a field is too large
            raise DataError(
                f"{path} line {reader.line_num}: not readable as a table ({error}); if quote marks are text there, "
                "set data.quoting=false"
            ) from error


def delimited_row(
    names: Sequence[str], data: bytes, delimiter: str, *, quoting: bool = True
) -> dict[str, Any] | DataError:
    """One row of a CSV or TSV file from its bytes, or what is wrong with it; see `delimited_rows`."""
    return _row(names, _fields(data, delimiter, quoting=quoting))


def header_names(path: str | Path, data: bytes, delimiter: str, *, quoting: bool = True) -> list[str]:
    """The fields of a CSV or TSV file's first row, from the bytes up to its end.

    Raises:
        DataError: they are no UTF-8.
    """
    names = _fields(data, delimiter, quoting=quoting)
    _check_header(path, 1, names)
    return names


def _fields(data: bytes, delimiter: str, *, quoting: bool) -> list[str]:
    options: dict[str, Any] = {} if quoting else {"quoting": csv.QUOTE_NONE}
    text = io.StringIO(data.removeprefix(_BOM).decode(errors="surrogateescape"), newline="")
    return next((fields for fields in csv.reader(text, delimiter=delimiter, **options) if fields), [])


def _check_header(path: str | Path, line: int, names: list[str]) -> None:
    row = _row(names, names)
    if isinstance(row, DataError):
        raise DataError(f"{path} line {line}: {row}")


def _row(names: Sequence[str], fields: list[str]) -> dict[str, Any] | DataError:
    for text in fields:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            return DataError(_not_utf8(ord(text[error.start]) - 0xDC00))
    if len(fields) != len(names):
        return DataError(f"{len(fields)} fields instead of {len(names)}")
    return dict(zip(names, fields, strict=True))


def _not_utf8(byte: int) -> str:
    return f"not UTF-8 (byte 0x{byte:02x}); convert the file, for example with iconv"
