"""Tars of examples: the files of each, what belongs to none, and tars that are damaged."""

from __future__ import annotations

import io
import tarfile

import pytest

from mmattn.data.stream_rows import StreamedRows
from mmattn.errors import DataError
from tests.data.shards import png, settings, write_tar


def test_files_of_a_tar(tmp_path):
    write_tar(
        tmp_path / "a.tar",
        [
            ("x/0.1", {"jpg": b"1"}),  # the key ends at the first dot
            ("a", {"jpg": png(1), "json": b'{"text": "one", "n": 1}', "txt": b" hello \n"}),
            ("b", {"PNG": png(2), "json": b"[1]"}),
            ("c", {"jpg": b"1", "txt": b"\xff"}),
            ("a" * 150, {"jpg": b"1", "txt": b"long name"}),
        ],
    )
    rows = StreamedRows(settings(tmp_path, tmp_path / "a.tar"))
    found = [row for _, row in rows.rows(range(5))]
    assert found[0] == {"1.jpg": b"1"}
    assert found[1] == {"jpg": png(1), "text": "one", "n": 1, "txt": "hello"}
    assert str(found[2]) == "its json is a JSON value, but no object"
    assert "its txt cannot be read ('utf-8' codec" in str(found[3])
    assert found[4] == {"jpg": b"1", "txt": "long name"}
    ((place, row),) = rows.rows([1], ["text"])
    assert row == {"text": "one", "n": 1, "txt": "hello"}
    assert place.endswith("a.tar example 2 (a)")


def test_damaged_tars_are_refused_by_name(tmp_path):
    path = write_tar(tmp_path / "a.tar", [(str(number), {"txt": b"x" * 900}) for number in range(30)])
    path.write_bytes(path.read_bytes()[:20_100])
    with pytest.raises(DataError, match=r"a\.tar: .*(cut short|unexpected end)"):
        StreamedRows(settings(tmp_path, path))
    (tmp_path / "b.tar").write_bytes(b"x" * 5000)
    with pytest.raises(DataError, match=r"b\.tar: cannot be read as a tar"):
        StreamedRows(settings(tmp_path, tmp_path / "b.tar"))
    with tarfile.open(tmp_path / "d.tar", "w") as tar:
        tar.addfile(*_member("a.txt", data=b"x"))
        tar.addfile(*_member("__x__", data=b"x"))
    (tmp_path / "d.tar").write_bytes((tmp_path / "d.tar").read_bytes()[:2048] + b"x" * 512)
    with pytest.raises(DataError, match=r"d\.tar: the tar is cut short or damaged: no end mark at byte 2,048"):
        StreamedRows(settings(tmp_path, tmp_path / "d.tar"))
    with tarfile.open(tmp_path / "c.tar", "w") as tar:
        tar.add(__file__, "README")
    with pytest.raises(DataError, match=r"c\.tar: README has no ending that says what it holds"):
        StreamedRows(settings(tmp_path, tmp_path / "c.tar"))


def _member(name, kind=tarfile.REGTYPE, data=b""):
    member = tarfile.TarInfo(name)
    member.type, member.size = kind, len(data)
    return member, io.BytesIO(data)


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize(
    "last",
    [
        _member("folder", tarfile.DIRTYPE),
        _member("link.txt", tarfile.SYMTYPE),
        _member("__meta__", data=b"x" * 1300),
        _member("y/" * 40 + "__" + "z" * 70 + "__", data=b"x" * 513),
    ],
)
def test_a_tar_may_end_in_what_is_no_example(tmp_path, form, last):
    with tarfile.open(tmp_path / "a.tar", "w", format=form) as tar:
        tar.addfile(*_member("first", tarfile.DIRTYPE))
        for number in range(3):
            tar.addfile(*_member(f"{number}.txt", data=b"x" * (511 + number)))
            tar.addfile(*_member("between", tarfile.DIRTYPE))
        last[1].seek(0)
        tar.addfile(*last)
    rows = StreamedRows(settings(tmp_path, tmp_path / "a.tar"))
    assert [row for _, row in rows.rows(range(3))] == [{"txt": "x" * (511 + number)} for number in range(3)]
    assert len(rows) == 3


def test_a_tar_without_files_has_no_rows(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.addfile(*_member("folder", tarfile.DIRTYPE))
    with pytest.raises(DataError, match=r"a\.tar is empty: no rows in 1 shards"):
        StreamedRows(settings(tmp_path, tmp_path / "a.tar"))
    write_tar(tmp_path / "b.tar", [("a", {"txt": b"x"})])
    assert len(StreamedRows(settings(tmp_path, tmp_path / "a.tar", tmp_path / "b.tar"))) == 1
