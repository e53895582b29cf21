"""Wrong sentence pairs, checkpoints and languages: one clear line, the right exit code, and nothing lost."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import pytest

from mmattn.cli.main import main
from tests.inference.tiny_translators import ENGLISH, GERMAN, save_stock_translator


def _fails(capsys, arguments: list[str], code: int, message: str) -> None:
    capsys.readouterr()
    assert main(arguments) == code
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("mmattn: ")]
    assert len(error) == 1, error
    assert re.search(message, error[0]), error[0]
    assert "unexpected" not in error[0]


@pytest.fixture
def aligned(tmp_path: Path) -> Path:
    """Two files of fifteen lines, and a tiny stock Marian in `base/`."""
    (tmp_path / "train.en").write_text("".join(f"{line}\n" for line in ENGLISH * 3))
    (tmp_path / "train.de").write_text("".join(f"{line}\n" for line in GERMAN * 3))
    (tmp_path / "files").mkdir()
    save_stock_translator(tmp_path / "base", "marian", files=tmp_path / "files")
    return tmp_path


def _train(folder: Path, *overrides: str, kind: str = "aligned") -> list[str]:
    data = [f"data.source_path={folder / 'train.en'}", f"data.target_path={folder / 'train.de'}"]
    return [
        *["train", "translate/finetune-opus-mt", f"data.kind={kind}", "data.path=null", "data.eval_fraction=0.3"],
        *(data if kind == "aligned" else []),
        *[f"model.from_pretrained={folder / 'base'}", f"training.output_dir={folder / 'run'}"],
        *["training.max_steps=2", "training.batch_tokens=80", "training.micro_batch_tokens=null"],
        *["training.num_workers=0", "training.eval_every=0", *overrides],
    ]


def test_files_of_different_length(aligned, capsys):
    with (aligned / "train.de").open("a") as file:
        file.write("Noch ein Satz.\n")
    for verb in ("train", "check"):
        message = r"train\.en has 15 lines and .*train\.de has 16: they are no translations of each other"
        _fails(capsys, [verb, *_train(aligned)[1:]], 2, message)
    assert not (aligned / "run").exists()


def test_one_bad_line_is_named_and_left_out(aligned, capsys, caplog):
    lines = (aligned / "train.de").read_bytes().split(b"\n")
    lines[6] = b"Gr\xfcn"
    (aligned / "train.de").write_bytes(b"\n".join(lines))
    with caplog.at_level(logging.WARNING):
        assert main(_train(aligned, "data.max_bad=1")) == 0
    assert re.search(r"left out .*train.de line 7: the target is not UTF-8 \(byte 0xfc\)", caplog.text)
    (aligned / "run").rename(aligned / "first")
    _fails(capsys, _train(aligned, "data.max_bad=0"), 2, r"1 of \d+ lines so far are bad, 0 allowed .*line 7")


def test_a_file_in_another_encoding(aligned, capsys):
    text = (aligned / "train.de").read_text()
    (aligned / "train.de").write_bytes(text.replace("u", "ü").encode("latin-1"))
    _fails(capsys, _train(aligned), 2, r"of 15 lines so far are bad.*not UTF-8 \(byte 0x..\); convert the file")


def test_an_unknown_language_code(tmp_path, capsys):
    (tmp_path / "files").mkdir()
    save_stock_translator(tmp_path / "base", "nllb", files=tmp_path / "files")
    rows = [{"source": source, "target": target} for source, target in zip(ENGLISH, GERMAN, strict=True)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    path = f"data.path={tmp_path / 'pairs.jsonl'}"

    def train(*overrides: str) -> list[str]:
        return _train(tmp_path, path, *overrides, kind="files")

    languages = ["data.src_lang=eng_Latn", "data.tgt_lang=deu_Lat"]
    message = r"tgt_lang='deu_Lat' is no language of this model; nearest: deu_Latn.*name it in language_codes"
    _fails(capsys, train(*languages), 2, message)
    _fails(capsys, train(), 2, r"pairs.jsonl line \d+ has no src_lang, which this tokenizer needs")
    assert main(train("data.src_lang=en", "data.tgt_lang=de", "data.language_codes={en: eng_Latn, de: deu_Latn}")) == 0


def test_a_vocabulary_that_does_not_fit_the_weights(aligned, capsys):
    vocab = json.loads((aligned / "base" / "vocab.json").read_text())
    (aligned / "base" / "vocab.json").write_text(json.dumps(vocab | {"one": len(vocab)}))
    _fails(capsys, _train(aligned), 2, rf"vocabulary has {len(vocab) + 1} entries, the weights {len(vocab)}")
    config = json.loads((aligned / "base" / "config.json").read_text())
    (aligned / "base" / "vocab.json").write_text(json.dumps(vocab))
    (aligned / "base" / "config.json").write_text(json.dumps(config | {"vocab_size": 1000}))
    _fails(capsys, _train(aligned), 2, r"the weights do not fit its config: .*of another shape: model.shared.weight")
    assert not (aligned / "run").exists()


def test_pairs_that_are_too_long(aligned, capsys):
    with (aligned / "train.en").open("a") as english, (aligned / "train.de").open("a") as german:
        english.write("cat " * 60 + "\n")
        german.write("Katze\n")
    refused = _train(aligned, "examples.refuse_long=true", "data.eval_fraction=0")
    message = r"1 of \d+ pairs are too long, such as .*line 16 has \d+ source and \d+ target tokens, allowed are 53"
    _fails(capsys, refused, 2, message)
    assert main(_train(aligned, "data.eval_fraction=0")) == 0
    assert "15 pairs (1 too long, left out)" in capsys.readouterr().err


def test_evaluation_says_what_it_cannot_do(aligned, capsys):
    assert main(_train(aligned)) == 0
    said = str(aligned / "said.jsonl")
    limits = ["evaluation.max_new_tokens=5", "evaluation.splits=[validation]"]
    assert main(["eval", str(aligned / "run"), "--output", said, *limits]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^bleu/signature +nrefs:1\|case:mixed", printed, re.MULTILINE)
    assert re.search(r"^validation/memory/chrf +\d+\.\d{4}$", printed, re.MULTILINE)
    assert {"reference", "hypothesis"} <= json.loads(Path(said).read_text().splitlines()[0]).keys()
    _fails(capsys, ["eval", str(aligned / "run"), "--output", said, *limits], 2, r"said\.jsonl: exists already")
    no_split = ["eval", str(aligned / "run"), "evaluation.splits=[heldout]"]
    _fails(capsys, no_split, 2, r"data.kind=aligned has no split 'heldout'")


def test_what_would_end_an_evaluation_is_said_before_the_training(aligned, capsys):
    wrong = {
        "evaluation.bleu_tokenize=nope": r"evaluation\.bleu_tokenize='nope' is unknown",
        "evaluation.limit=0": r"evaluation\.limit must be at least 1 or null, not 0",
        "evaluation.num_beams=99": r"num_beams is 99; that is too many",
        "evaluation.max_new_tokens=64": r"up to 65 tokens .* 53 positions: set \S*max_new_tokens to 52 or less",
        "evaluation.splits=[valid]": r"unknown split 'valid': use one of train",
    }
    settings = ["evaluation.max_new_tokens=20", "training.eval_every=1"]
    for override, message in wrong.items():
        _fails(capsys, _train(aligned, *settings, override), 2, message)
        _fails(capsys, ["check", *_train(aligned, *settings, override)[1:]], 2, message)
    assert not (aligned / "run").exists()
