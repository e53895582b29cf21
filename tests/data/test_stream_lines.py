"""Shards of lines: JSON lines and rows of CSV and TSV, the same ones as in a table of the same file."""

from __future__ import annotations

import numpy as np
import pytest

from mmattn.data.stream_rows import StreamedRows
from mmattn.data.text_rows import delimited_rows
from mmattn.errors import DataError
from tests.data.shards import settings


def test_lines_that_are_no_rows(tmp_path):
    text = '\ufeff{"a": "Zürich\u2028x"}\r\n\n   \n{"a": 2}\n[1]\n{"a": \n\n{"a": "\U0001f600"}'
    (tmp_path / "a.jsonl").write_bytes(text.encode() + b'\n{"a": "\xff"}\n\n')
    found = StreamedRows(settings(tmp_path, tmp_path / "a.jsonl")).rows(range(6))
    assert [row if isinstance(row, dict) else str(row)[:20] for _, row in found] == [
        {"a": "Zürich\u2028x"}, {"a": 2}, "a JSON value, but no", "not JSON (Expecting ", {"a": "\U0001f600"},
        "not UTF-8 (byte 0xff",
    ]  # fmt: skip
    assert [place.rpartition(" ")[2] for place, _ in found] == ["1", "4", "5", "6", "8", "9"]


def test_csv_rows_may_span_lines(tmp_path):
    text = '\ufeffa,b\r\n\r\n1,"two\nlines"\r\n"x""y",ü\r\nlonely\r\n3,4'
    (tmp_path / "a.csv").write_bytes(text.encode())
    rows = StreamedRows(settings(tmp_path, tmp_path / "a.csv"))
    found = rows.rows([3, 0, 1, 2])
    assert [row for _, row in found][:3] == [
        {"a": "3", "b": "4"},
        {"a": "1", "b": "two\nlines"},
        {"a": 'x"y', "b": "ü"},
    ]
    assert str(found[3][1]) == "1 fields instead of 2"
    assert [place.rpartition(" ")[2] for place, _ in found] == ["7", "3", "5", "6"]
    assert rows.column_names() == ["a", "b"]
    (tmp_path / "b.tsv").write_text('1\t"x\n2\ty"\n')
    bare = StreamedRows(settings(tmp_path, tmp_path / "b.tsv"), header=False, quoting=False)
    assert [row for _, row in bare.rows([0, 1])] == [{"1": "1", "2": '"x'}, {"1": "2", "2": 'y"'}]
    (tmp_path / "c.csv").write_text('a,b\n1,2\n1,"' + "x\n" * 100_000)
    with pytest.raises(
        DataError, match=r"c\.csv line \d+: not readable as a table .* row starts at line 3: .*data\.quoting=false"
    ):
        StreamedRows(settings(tmp_path, tmp_path / "c.csv"))
    (tmp_path / "d.csv").write_text("a,b\n1," + "x" * 200_000)
    with pytest.raises(DataError, match=r"d\.csv line 2: .*\(field larger .*\); is that the right delimiter"):
        StreamedRows(settings(tmp_path, tmp_path / "d.csv"), quoting=False)


def _same_as_the_table(tmp_path, data, quoting, header):
    (tmp_path / "a.csv").write_bytes(data)
    table = list(delimited_rows(tmp_path / "a.csv", ",", header=header, quoting=quoting))
    rows = StreamedRows(settings(tmp_path, tmp_path / "a.csv"), header=header, quoting=quoting)
    found = rows.rows(range(len(rows)))
    assert [row if isinstance(row, dict) else str(row) for _, row in found] == [
        row if isinstance(row, dict) else str(row) for _, row in table
    ]
    return found


def test_a_lone_carriage_return_ends_a_row_as_in_a_table(tmp_path):
    found = _same_as_the_table(tmp_path, "a,b\r\n1,2\n3,ü\r4\n5,6\n".encode(), True, True)
    assert [row if isinstance(row, dict) else str(row) for _, row in found] == [
        {"a": "1", "b": "2"},
        {"a": "3", "b": "ü"},
        "1 fields instead of 2",
        {"a": "5", "b": "6"},
    ]
    assert [place.rpartition(" ")[2] for place, _ in found] == ["2", "3", "4", "5"]
    assert len(_same_as_the_table(tmp_path, b"a,b\r1,2\r\r3,4\r", True, True)) == 2
    ((_, row),) = _same_as_the_table(tmp_path, b'a,b\n"1\r",2\n', True, True)
    assert row == {"a": "1\r", "b": "2"}


@pytest.mark.parametrize(("quoting", "header"), [(True, True), (False, True), (True, False)])
def test_rows_of_any_bytes_are_those_of_a_table(tmp_path, quoting, header):
    random = np.random.default_rng(11)
    pieces = [b"a", b"b,", b",", b'"', b'""', b"\r", b"\n", b"\r\n", "ü".encode(), "\u2028".encode(), b"\xff", b"\xc3"]
    for number in range(61):
        body = b"".join(pieces[place] for place in random.integers(0, len(pieces), 97))
        start = b"\xef\xbb\xbf" if number % 3 == 0 else b""
        _same_as_the_table(tmp_path, start + b"x,y\n" + body + b'\n1,2\n"1",2\n', quoting, header)


@pytest.mark.parametrize("header", [True, False])
def test_shards_of_empty_lines_between_others(tmp_path, header):
    for name, text in (("0", "a,b\n1,2\n"), ("1", "\n\r\n\n"), ("2", "a,b\n3,4\n")):
        (tmp_path / f"{name}.csv").write_text(text)
    rows = StreamedRows(settings(tmp_path, tmp_path / "*.csv"), header=header)
    used = ("a", "b") if header else ("1", "2")
    rows.require_columns(dict(zip(("source", "target"), used, strict=True)))
    assert rows.rows([len(rows) - 1])[0][1] == dict(zip(used, ("3", "4"), strict=True))
    with pytest.raises(DataError, match=r"0\.csv has no column 'c'"):
        rows.require_columns({"source": "c"})
    if not header:
        with pytest.raises(DataError, match=r"1\.csv has no rows, which would say how many columns"):
            rows.shards[1].column_names()
