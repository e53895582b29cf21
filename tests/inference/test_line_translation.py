"""Lines in, lines out: chunks, formats, bad lines by number."""

from __future__ import annotations

import io
import json
import os
import threading

import numpy as np
import pytest

from mmattn.errors import DataError, RunError, UsageError
from mmattn.inference.alignments import Alignment
from mmattn.inference.files import check_new_file, new_file
from mmattn.inference.line_translation import LineTranslator, OutputFormat, count_lines, line_chunks, no_room
from mmattn.inference.translation import Translated
from tests.inference.tiny_translators import ENGLISH

LONG = " ".join(ENGLISH).replace(".", "").replace("!", "").replace("?", "")  # one sentence, longer than the model


def _lines(data: bytes) -> list[bytes]:
    return [line for chunk in line_chunks(io.BytesIO(data)) for line in chunk]


def test_lines_end_at_newlines_only_and_the_last_may_have_none():
    assert _lines(b"") == []
    assert _lines(b"a\n\nb\x0bc\xe2\x80\xa8d\r\n") == [b"a", b"", b"b\x0bc\xe2\x80\xa8d\r"]
    assert _lines(b"a\nb") == [b"a", b"b"]
    big = b"\n".join(b"%d" % number * 9 for number in range(30_000))
    assert _lines(big) == big.split(b"\n")
    assert len(list(line_chunks(io.BytesIO(big)))) > 10


def test_a_line_does_not_wait_for_others():
    read, write = os.pipe()
    with open(read, "rb") as source, open(write, "wb", buffering=0) as sink:
        chunks = line_chunks(source)
        sink.write(b"one\ntwo\nthr")
        assert next(chunks) == [b"one", b"two"]
        timer = threading.Timer(0.1, lambda: (sink.write(b"ee\n"), sink.close()))
        timer.start()
        assert next(chunks) == [b"three"]
        assert next(chunks, None) is None
        timer.join()


def test_count_lines(tmp_path):
    path = tmp_path / "file"
    for data, count in ((b"", 0), (b"a", 1), (b"a\n", 1), (b"a\n\nb", 3)):
        path.write_bytes(data)
        assert count_lines(path) == count == len(_lines(data))


def test_formats():
    alignment = Alignment(["one", "cat"], ["eine", "Katze"], np.eye(2, dtype=np.float32))
    found = Translated("eine\nKatze\tda", -1.25, alignment)
    assert OutputFormat()("one cat", "eine\nKatze") == "eine Katze"
    assert OutputFormat()("one\ncat", "eine\nKatze") == "eine\nKatze"
    columns = OutputFormat(with_scores=True, with_alignment=True)
    assert columns("one cat", found) == "eine Katze da\t-1.2500\t0-0 1-1"
    assert columns("", Translated("")) == "\t0.0000\t"
    as_json = OutputFormat(as_json=True, with_scores=True, with_alignment=True)
    assert json.loads(as_json("one cat", found)) == {
        "source": "one cat",
        "translation": "eine Katze\tda",
        "score": -1.25,
        "source_words": ["one", "cat"],
        "target_words": ["eine", "Katze"],
        "alignment": [[0, 0], [1, 1]],
    }
    assert json.loads(OutputFormat(as_json=True)("é", "ß")) == {"source": "é", "translation": "ß"}
    assert OutputFormat().of_bad("why") == ""
    assert json.loads(as_json.of_bad("why")) == {"source": None, "translation": None, "error": "why"}


def _translate(translators, *chunks: list[bytes], **options):
    said: list[str] = []
    lines = LineTranslator(
        translators["marian"], "in.txt", OutputFormat(), say=said.append, max_new_tokens=7, **options
    )
    return [line for chunk in chunks for line in lines(chunk)], said, lines


def test_lines_are_translated_in_order_and_numbered_over_chunks(translators):
    texts = [*ENGLISH, "", "  ", "a\r"]
    raws = [text.encode() for text in texts]
    found, said, lines = _translate(translators, raws[:3], raws[3:])
    expected = translators["marian"].translate([text.rstrip("\r") for text in texts], max_new_tokens=7)
    assert found == expected
    assert (said, lines.num_lines, lines.num_bad, lines.summary()) == ([], 8, 0, None)


def test_bad_lines_are_named_counted_and_left_empty(translators):
    raws = [b"\xef\xbb\xbfOne cat.", b"Two \xff dogs.", LONG.encode(), b"A cat."]
    found, said, lines = _translate(translators, [b"a", b"b"], raws)
    good = translators["marian"].translate(["a", "b", "\ufeffOne cat.", "A cat."], max_new_tokens=7)
    assert found == [*good[:3], "", "", good[3]]
    assert said[0].startswith("in.txt line 4: not UTF-8 (byte 0xff); convert the file")
    assert said[1].startswith("in.txt line 5: holds a sentence of ")
    assert all(message.endswith("; left empty") for message in said)
    assert lines.summary() == "2 of 6 lines could not be translated and were left empty"


def test_a_byte_order_mark_is_no_text(translators):
    found, _, _ = _translate(translators, [b"\xef\xbb\xbfOne cat."])
    assert found == translators["marian"].translate(["One cat."], max_new_tokens=7)


def test_many_bad_lines_are_not_all_named(translators):
    found, said, lines = _translate(translators, [b"\xff"] * 50)
    assert (found, len(said), lines.num_bad) == ([""] * 50, 20, 50)


@pytest.mark.parametrize(
    ("bad", "message"), [(b"\xff", r"in.txt line 3: not UTF-8 .*; stopped there"), (LONG.encode(), r"line 3: holds")]
)
def test_a_bad_line_is_an_error_when_asked_for(translators, bad, message):
    lines = LineTranslator(translators["marian"], "in.txt", OutputFormat(), say=print, stops=True, max_new_tokens=7)
    running = lines([b"One cat.", b"A cat.", bad, b"The end."])
    found = [next(running), next(running)]
    with pytest.raises(DataError, match=message):
        next(running)
    assert found == translators["marian"].translate(["One cat.", "A cat."], max_new_tokens=7)


def test_wrong_arguments_are_no_bad_lines(translators):
    with pytest.raises(UsageError, match="unknown generation argument 'num_beam'"):
        _translate(translators, [b"a", LONG.encode()], num_beam=2)
    with pytest.raises(UsageError, match="src_lang"):
        _translate(translators, [b"a"], languages=("en", None))


def test_no_room(translators):
    assert no_room(translators["marian"], ENGLISH[0]) is None
    assert no_room(translators["marian"], " ".join(ENGLISH)) is None  # cut at its sentence ends
    assert str(no_room(translators["marian"], LONG)).startswith("holds a sentence of ")
    with_languages = no_room(translators["nllb"], LONG, "eng_Latn", "deu_Latn")
    assert with_languages is not None


def test_a_new_file_is_complete_or_not_there(tmp_path):
    path = tmp_path / "out.txt"
    with new_file(path) as file:
        file.write(b"one")
        assert not path.exists()
    assert path.read_bytes() == b"one"
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.txt"]
    with pytest.raises(UsageError, match=r"out.txt: exists already; nothing was written. Choose another name$"):
        check_new_file(path)
    with pytest.raises(UsageError, match=r"none/out.txt: the folder .*none does not exist; make it first"):
        check_new_file(tmp_path / "none" / "out.txt")
    with (
        pytest.raises(RunError, match=r"none/out.txt: cannot be written \(No such file"),
        new_file(tmp_path / "none" / "out.txt"),
    ):
        pass


def _write(path, data: bytes, error: Exception) -> None:
    with new_file(path) as file:
        file.write(data)
        raise error


def test_what_was_done_before_an_error_is_kept(tmp_path):
    path = tmp_path / "out.txt"
    with pytest.raises(DataError, match=r"line 2 is bad; what is done is in .*out.txt.part"):
        _write(path, b"one", DataError("line 2 is bad"))
    assert (tmp_path / "out.txt.part").read_bytes() == b"one"
    with pytest.raises(RunError, match=r"out.txt: not complete \(No space left on device\); what is done is in"):
        _write(path, b"two", OSError(28, "No space left on device"))
    assert (tmp_path / "out.txt.part").read_bytes() == b"two"
    with pytest.raises(DataError, match=r"^nothing yet$"):
        _write(tmp_path / "empty.txt", b"", DataError("nothing yet"))
    assert not list(tmp_path.glob("empty*"))
