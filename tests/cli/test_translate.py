"""`mmattn translate` on tiny checkpoints: texts, files, a filter, and what is said when something is wrong."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mmattn.cli.main import main
from mmattn.inference.translator import Translator
from mmattn.models.translator import CompiledDecoder, TranslatorNetwork
from tests.inference.tiny_translators import ENGLISH, save_stock_translator


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    made = {}
    for kind in ("marian", "nllb"):
        made[kind] = tmp_path_factory.mktemp(kind)
        save_stock_translator(made[kind], kind, files=tmp_path_factory.mktemp("files"))
    return made


@pytest.fixture(scope="module")
def expected(folders) -> list[str]:
    return Translator.from_pretrained(folders["marian"], device="cpu").translate(ENGLISH, max_new_tokens=7)


@pytest.fixture
def marian(folders) -> list[str]:
    return ["translate", str(folders["marian"]), "--max-new-tokens", "7"]


def _feed(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


def test_texts(marian, expected, capsys):
    assert main([*marian, *ENGLISH]) == 0
    assert capsys.readouterr().out == "".join(f"{text}\n" for text in expected)


def test_compiled(marian, expected, capsys, monkeypatch):
    made = []

    def compiled(network: TranslatorNetwork, **_: str) -> CompiledDecoder:
        made.append(CompiledDecoder(network, backend="eager"))
        return made[-1]

    monkeypatch.setattr("mmattn.inference.translator.CompiledDecoder", compiled)
    assert main([*marian, "--compile", *ENGLISH]) == 0
    assert capsys.readouterr().out == "".join(f"{text}\n" for text in expected)
    assert len(made) == 1
    assert main([*marian, "--compile", "--quantize", "int8", *ENGLISH]) == 2
    assert "compile=True does not go with quantize='int8': leave one of them out" in capsys.readouterr().err


def test_a_filter(marian, expected, capsys, monkeypatch):
    _feed(monkeypatch, "\n".join(ENGLISH).encode())
    assert main(marian) == 0
    printed = capsys.readouterr()
    assert printed.out == "".join(f"{text}\n" for text in expected)
    assert printed.err == ""


def test_a_file_to_a_new_file(marian, expected, capsys, tmp_path):
    (tmp_path / "in.txt").write_text("\n".join(ENGLISH) + "\n")
    files = ["--input", str(tmp_path / "in.txt"), "-o", str(tmp_path / "out.txt")]
    assert main([*marian, *files]) == 0
    assert (tmp_path / "out.txt").read_text() == "".join(f"{text}\n" for text in expected)
    assert capsys.readouterr().out == ""
    before = (tmp_path / "out.txt").read_text()
    assert main([*marian, *files]) == 2
    assert "out.txt: exists already; nothing was written" in capsys.readouterr().err
    assert (tmp_path / "out.txt").read_text() == before


def test_a_training_runs_folder(folders, expected, capsys, tmp_path):
    shutil.copytree(folders["marian"], tmp_path / "run" / "final")
    assert main(["translate", str(tmp_path / "run"), "--max-new-tokens", "7", ENGLISH[0]]) == 0
    assert capsys.readouterr().out == f"{expected[0]}\n"


def test_columns_and_json(marian, capsys):
    options = ["--scores", "--alignment", "--num-beams", "2"]
    assert main([*marian, *options, ENGLISH[1]]) == 0
    text, score, links = capsys.readouterr().out.rstrip("\n").split("\t")
    assert main([*marian, *options, ENGLISH[1], "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["translation"] == text
    assert found["score"] == pytest.approx(float(score), abs=1e-4)
    assert " ".join(f"{source}-{target}" for source, target in found["alignment"]) == links
    assert found["source_words"] == ENGLISH[1].split()


def test_languages(folders, capsys):
    arguments = ["translate", str(folders["nllb"]), "--max-new-tokens", "5", "--src-lang", "eng_Latn"]
    assert main([*arguments, "--tgt-lang", "deu_Latn", "A cat."]) == 0
    translator = Translator.from_pretrained(folders["nllb"], device="cpu")
    text = translator.translate("A cat.", src_lang="eng_Latn", tgt_lang="deu_Latn", max_new_tokens=5)
    assert capsys.readouterr().out == f"{text}\n"


def test_int8(folders, capsys):
    assert main(["translate", str(folders["marian"]), "--quantize", "int8", "--max-new-tokens", "5", "A cat."]) == 0
    assert capsys.readouterr().out.count("\n") == 1


def test_one_bad_line_is_named_and_the_others_are_translated(marian, expected, capsys, monkeypatch, tmp_path):
    lines = [ENGLISH[0].encode(), b"Gr\xfcn", ENGLISH[2].encode(), b""]
    _feed(monkeypatch, b"\n".join(lines))
    assert main(marian) == 0
    printed = capsys.readouterr()
    assert printed.out == f"{expected[0]}\n\n{expected[2]}\n"
    assert printed.err.splitlines() == [
        "mmattn: stdin line 2: not UTF-8 (byte 0xfc); convert the file, for example with iconv; left empty",
        "mmattn: 1 of 3 lines could not be translated and were left empty",
    ]
    (tmp_path / "in.txt").write_bytes(b"\n".join(lines))
    assert main([*marian, "--json", "--input", str(tmp_path / "in.txt"), "--output", str(tmp_path / "out")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    assert rows[1]["translation"] is None
    assert rows[1]["error"].startswith("not UTF-8")
    assert rows[2]["translation"] == expected[2]


def test_a_bad_line_stops_when_asked_for_and_loses_nothing(marian, expected, capsys, tmp_path):
    (tmp_path / "in.txt").write_bytes(b"\n".join([ENGLISH[0].encode(), b"Gr\xfcn", b"A cat."]))
    files = ["--input", str(tmp_path / "in.txt"), "--output", str(tmp_path / "out.txt")]
    assert main([*marian, *files, "--on-bad", "stop"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"mmattn: {tmp_path / 'in.txt'} line 2: not UTF-8 (byte 0xfc)")
    assert f"stopped there; what is done is in {tmp_path / 'out.txt.part'}" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out.txt").exists()
    assert (tmp_path / "out.txt.part").read_text() == f"{expected[0]}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tgt-lang", "de_Latn"], "tgt_lang='de_Latn' is no language of this model; nearest: deu_Latn"),
        (["--src-lang", "eng_Lat"], "src_lang='eng_Lat' is no language of this model; nearest: eng_Latn"),
        (["--src-lang", "eng_Latn"], "this model translates into 3 languages: give tgt_lang"),
    ],
)
def test_wrong_languages(folders, capsys, arguments, message, monkeypatch):
    _feed(monkeypatch, b"A cat.\n")
    assert main(["translate", str(folders["nllb"]), *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"mmattn: {message}")
    assert printed.err.count("\n") == 1


def test_wrong_files(marian, capsys, tmp_path):
    def fails(message: str, *arguments: str) -> None:
        assert main([*marian, *arguments]) == 2
        assert message in capsys.readouterr().err

    fails("gone.txt: no such file", "--input", str(tmp_path / "gone.txt"))
    fails("is a folder, not a file", "--input", str(tmp_path))
    fails("/dev/null: is a pipe or device, not a file: leave --input out", "--input", "/dev/null")
    (tmp_path / "in.txt").write_text("A cat.")
    fails("texts are given as well", "--input", str(tmp_path / "in.txt"), "A cat.")
    fails("does not exist; make it first", "--output", str(tmp_path / "none" / "out.txt"), "A cat.")
    assert main(["translate", str(tmp_path), "A cat."]) == 2
    assert "no model here" in capsys.readouterr().err


def test_a_language_for_a_model_of_one_pair(marian, capsys):
    assert main([*marian, "--tgt-lang", "de", "A cat."]) == 2
    assert "this model translates one pair of languages, leave tgt_lang out" in capsys.readouterr().err


def test_a_vocabulary_that_does_not_fit_the_weights(folders, capsys, tmp_path):
    shutil.copytree(folders["marian"], tmp_path / "mixed")
    vocab = json.loads((tmp_path / "mixed" / "vocab.json").read_text())
    (tmp_path / "mixed" / "vocab.json").write_text(json.dumps(vocab | {"one": len(vocab), "more": len(vocab) + 1}))
    assert main(["translate", str(tmp_path / "mixed"), "A cat."]) == 2
    error = capsys.readouterr().err
    assert f"the tokenizer's vocabulary has {len(vocab) + 2} entries, the weights {len(vocab)}" in error
    assert error.count("\n") == 1


def test_a_reader_that_goes_away_is_no_error_message(marian):
    command = [sys.executable, "-m", "mmattn", *marian]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        process.stdin.write(b"A cat.\n")
        process.stdin.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1
