"""Parallel text of the user's own: tables, aligned files, hub layouts, several languages, bad input."""

from __future__ import annotations

import csv
import json
import logging
import pickle
from pathlib import Path

import datasets
import numpy as np
import pytest

from mmattn.config import load_config, to_yaml
from mmattn.data.parallel import open_parallel
from mmattn.data.parallel_spec import ParallelColumns, ParallelConfig, ParallelPart
from mmattn.data.scenes.translation import SceneTranslations
from mmattn.data.sentence_pairs import BatchedPairs, ParallelSource
from mmattn.errors import ConfigError, DataError


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def _rows(count: int) -> list[dict]:
    return [{"source": f"a sentence {n}", "target": f"ein Satz {n}"} for n in range(count)]


def _write(path: Path, rows: list[dict]) -> str:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(str(path))
    else:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0].keys(), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return str(path)


def _files(path: str | Path, **options) -> ParallelConfig:
    return ParallelConfig(kind="files", path=str(path), **{"eval_fraction": 0.0, **options})


def _all(source: ParallelSource) -> list[tuple[str, str]]:
    return [(source[index].source, source[index].target) for index in range(len(source))]


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_tables(tmp_path, kind):
    path = _write(tmp_path / f"data.{kind}", _rows(7))
    source = open_parallel(_files(path, src_lang="en", tgt_lang="de"))
    assert isinstance(source, ParallelSource)
    assert isinstance(source, BatchedPairs)
    assert (source.name, len(source)) == (path, 7)
    assert _all(source) == [(row["source"], row["target"]) for row in _rows(7)]
    place = {"jsonl": "line 3", "csv": "line 4", "tsv": "line 4"}.get(kind, "row 3")
    assert source[2].id == f"{path} {place}"
    assert (source[2].src_lang, source[2].tgt_lang, source[2].alignment, source[2].kind) == ("en", "de", None, "text")
    assert source.pairs([6, 0, 6]) == [source[6], source[0], source[6]]
    assert pickle.loads(pickle.dumps(source)).pairs([5, 1]) == source.pairs([5, 1])
    with pytest.raises(IndexError, match="has 7 pairs, no number 7"):
        source[7]


def test_columns_languages_alignments_and_kinds(tmp_path):
    rows = [
        {"en": "a red ring", "other": "ein roter Ring", "to": "de", "links": "0-0 1-1 2-2", "type": "caption"},
        {"en": "a ring", "other": "un anneau", "to": "fr", "links": "", "type": ""},
    ]
    columns = ParallelColumns("en", "other", tgt_lang="to", alignment="links", kind="type")
    for kind in ("jsonl", "csv"):
        source = open_parallel(_files(_write(tmp_path / f"data.{kind}", rows), columns=columns, src_lang="en"))
        assert [(pair.src_lang, pair.tgt_lang) for pair in source.pairs([0, 1])] == [("en", "de"), ("en", "fr")]
        assert [pair.alignment for pair in source.pairs([0, 1])] == [((0, 0), (1, 1), (2, 2)), None]
        assert [pair.kind for pair in source.pairs([0, 1])] == ["caption", "text"]
    listed = [{"source": "a ring", "target": "ein Ring", "links": [[0, 0], [1, 1]]}]
    for kind in ("jsonl", "parquet"):
        path = _write(tmp_path / f"listed.{kind}", listed)
        source = open_parallel(_files(path, columns=ParallelColumns(alignment="links")))
        assert source[0].alignment == ((0, 0), (1, 1))


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_texts_by_language_in_a_column(tmp_path, kind):
    rows = [{"id": n, "translation": {"en": f"sentence {n}", "de": f"Satz {n}", "fr": f"phrase {n}"}} for n in range(3)]
    path = _write(tmp_path / f"data.{kind}", rows)
    source = open_parallel(_files(path, src_lang="de", tgt_lang="fr"))
    assert _all(source)[2] == ("Satz 2", "phrase 2")
    with pytest.raises(DataError, match=r"texts by language \(.*en.*\) in column 'translation': set data.src_lang and"):
        open_parallel(_files(path))
    with pytest.raises(DataError, match="has no language 'es' in column 'translation', it has .*fr"):
        open_parallel(_files(path, src_lang="en", tgt_lang="es"))
    without = _write(tmp_path / f"without.{kind}", [{"id": 9, "translation": None}, *rows])
    assert _all(open_parallel(_files(without, src_lang="de", tgt_lang="fr"))) == _all(source)
    with pytest.raises(
        DataError, match=r"texts by language \(not seen yet\) in column 'translation': set data.src_lang"
    ):
        open_parallel(_files(without))


def test_a_hub_layout_with_splits(tmp_path):
    for split, count in (("train", 5), ("validation", 3)):
        rows = [{"translation": {"en": f"{split} {n}", "de": f"{split} {n} auf Deutsch"}} for n in range(count)]
        _write(tmp_path / f"{split}.parquet", rows)
    spec = ParallelConfig(kind="hub", path=str(tmp_path), src_lang="en", tgt_lang="de")
    assert [len(open_parallel(spec, split)) for split in ("train", "validation", "test")] == [5, 3, 3]
    assert open_parallel(spec, "validation")[0].source == "validation 0"
    with pytest.raises(DataError, match="has no split 'dev', it has train, validation; set data.train_split"):
        open_parallel(ParallelConfig(kind="hub", path=str(tmp_path), eval_split="dev"), "test")
    with pytest.raises(DataError, match="cannot be loaded with datasets"):
        open_parallel(ParallelConfig(kind="hub", path=str(tmp_path / "none")))


def _aligned(folder: Path, source: str, target: str, **options) -> ParallelConfig:
    paths = [folder / "corpus.en", folder / "corpus.de"]
    for path, text in zip(paths, (source, target), strict=True):
        path.write_bytes(text.encode("utf-8", "surrogateescape"))
    return ParallelConfig(
        kind="aligned", source_path=str(paths[0]), target_path=str(paths[1]), **{"eval_fraction": 0.0, **options}
    )


def test_aligned_files(tmp_path):
    # U+2028, form feeds and carriage returns within a line are no ends of lines.
    spec = _aligned(tmp_path, "\ufeffone\r\ntwo \u2028 three\nfour", "eins\r\nzwei \x0c drei\nvier\n")
    source = open_parallel(spec)
    assert _all(source) == [("one", "eins"), ("two \u2028 three", "zwei \x0c drei"), ("four", "vier")]
    assert source[1].id.endswith("corpus.en + " + str(tmp_path / "corpus.de") + " line 2")


def test_files_of_different_length_are_refused_with_both_counts(tmp_path):
    spec = _aligned(tmp_path, "one\ntwo\nthree\n", "eins\nzwei\n")
    with pytest.raises(DataError, match=r"corpus\.en has 3 lines and .*corpus\.de has 2: they are no translations"):
        open_parallel(spec)
    with pytest.raises(DataError, match=r"corpus\.en has 1 lines and .*corpus\.de has 4"):
        open_parallel(_aligned(tmp_path, "one\n", "1\n2\n3\n4", max_bad=1000))


def test_one_bad_line_among_many_is_named_and_left_out(tmp_path, caplog):
    count = 3000
    source = "".join("caf\udce9\n" if n == 1233 else f"line {n}\n" for n in range(count))
    target = "".join(" \n" if n == 7 else f"Zeile {n}\n" for n in range(count))
    with caplog.at_level(logging.INFO):
        pairs = open_parallel(_aligned(tmp_path, source, target))
    assert len(pairs) == count - 2
    assert pairs[7].source == "line 8"
    assert (pairs.num_bad, pairs.dropped) == (2, {})
    told = [record.getMessage() for record in caplog.records]
    assert told[0].endswith("corpus.de line 8: the target is empty")
    assert told[1].endswith("line 1234: the source is not UTF-8 (byte 0xe9); convert the file, for example with iconv")
    assert told[2].endswith("2,998 pairs; left out: 2 that are bad")
    with pytest.raises(
        DataError, match=r"1 of 8 lines so far are bad, 0 allowed \(data.max_bad, .*line 8: the target is"
    ):
        open_parallel(_aligned(tmp_path, source, target, max_bad=0))


def test_a_first_line_that_is_bad_is_left_out_like_any_other(tmp_path):
    assert len(open_parallel(_aligned(tmp_path, "\ntwo\nthree", "eins\nzwei\ndrei", max_bad=1))) == 2


@pytest.mark.parametrize(
    ("name", "content", "line", "reason"),
    [
        ("a.jsonl", '{"source": "a", "target": "b"}\n{"source": "c"\n', 2, "not JSON"),
        ("a.jsonl", '{"source": "a", "target": "b"}\n\n["c"]\n', 3, "a JSON value, but no object"),
        ("a.jsonl", '{"source": "a", "target": "b"}\n{"source": "c"}\n', 2, "the target is empty"),
        ("a.jsonl", '{"source": "a", "target": "b"}\n{"source": "c", "target": 3}\n', 2, "the target is int, not text"),
        (
            "a.jsonl",
            '{"source": "a", "target": "b"}\n{"source": "\\ud800", "target": "d"}\n',
            2,
            "half of a surrogate pair",
        ),
        ("a.jsonl", '{"source": "a", "target": "b"}\n{"source": "c\\nd", "target": "d"}\n', 2, "holds a line break"),
        ("a.csv", "source,target\na,b\nc,d,e\n", 3, "3 fields instead of 2"),
        ("a.csv", "source,target\na,b\nc\udcff,d\n", 3, r"not UTF-8 \(byte 0xff\)"),
        ("a.csv", 'source,target\na,b\n"c\nd",d\n', 4, "holds a line break; if quote marks are text in that file, set"),
        ("a.tsv", "source\ttarget\na\tb\nc\t\n", 3, "the target is empty"),
    ],
)
def test_bad_rows_are_named_by_line(tmp_path, caplog, name, content, line, reason):
    path = tmp_path / name
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    source = open_parallel(_files(path))
    assert _all(source) == [("a", "b")]
    with pytest.raises(DataError, match=f"line {line}: .*{reason}"):
        open_parallel(_files(path, max_bad=0))
    assert f"left out {path} line {line}: " in caplog.text


def test_too_many_bad_lines_are_refused(tmp_path):
    source = "".join(f"{'' if n % 5 == 0 else n}\n" for n in range(100))
    target = "".join(f"{n}\n" for n in range(100))
    with pytest.raises(
        DataError, match=r"20 of 100 lines so far are bad, 5 allowed .*; the last: .*line 96: the source is"
    ):
        open_parallel(_aligned(tmp_path, source, target))
    assert len(open_parallel(_aligned(tmp_path, source, target, max_bad_fraction=0.25))) == 80
    utf16 = tmp_path / "corpus.tsv"
    utf16.write_bytes("source\ttarget\na\tb\n".encode("utf-16"))
    with pytest.raises(DataError, match=r"corpus\.tsv line 1: not UTF-8 \(byte 0xff\)"):
        open_parallel(_files(utf16))


def test_quote_marks_as_text(tmp_path):
    path = tmp_path / "data.tsv"
    path.write_text('source\ttarget\n"Yes\t"Ja\n"No" he said\t„Nein“, sagte er\nNA\tnull\n', encoding="utf-8")
    source = open_parallel(_files(path, quoting=False))
    assert _all(source) == [('"Yes', '"Ja'), ('"No" he said', "„Nein“, sagte er"), ("NA", "null")]
    with pytest.raises(DataError, match="set data.quoting=false|1 fields instead of 2"):
        open_parallel(_files(path, max_bad=0))


def test_files_without_header_have_numbered_columns(tmp_path):
    path = tmp_path / "data.tsv"
    path.write_text("1276\tLet's go.\t77\tGehen wir.\n1277\tHi.\t78\tHallo.\n", encoding="utf-8")
    spec = _files(path, header=False, columns=ParallelColumns("2", "4"))
    assert _all(open_parallel(spec)) == [("Let's go.", "Gehen wir."), ("Hi.", "Hallo.")]
    path.write_text("one\teins\n", encoding="utf-8")
    assert _all(open_parallel(_files(path, header=False))) == [("one", "eins")]


def test_several_files(tmp_path):
    _write(tmp_path / "part-1.jsonl", _rows(2))
    _write(tmp_path / "part-2.jsonl", [*_rows(1), {"source": "", "target": "x"}])
    source = open_parallel(_files(tmp_path / "part-*.jsonl"))
    assert len(source) == 3
    assert source[2].id.endswith("part-2.jsonl line 1")


def test_pairs_are_left_out_only_when_asked_and_counted(tmp_path, caplog):
    rows = [
        {"source": "a b c", "target": "x y z"},
        {"source": "same", "target": "same"},
        {"source": "a b c", "target": "x y z"},
        {"source": "a b c d e f", "target": "x"},
        {"source": "a b c d e f g h", "target": "s t u v w x y z"},
        {"source": "one", "target": "eins"},
    ]
    path = _write(tmp_path / "data.jsonl", rows)
    assert len(open_parallel(_files(path))) == 6
    options = {"min_words": 1, "max_words": 6, "max_ratio": 3.0, "drop_equal": True, "drop_duplicates": True}
    with caplog.at_level(logging.INFO):
        source = open_parallel(_files(path, **options))
    assert [pair[0] for pair in _all(source)] == ["a b c", "one"]
    assert caplog.messages == [
        f"{path}: 2 pairs; left out: 1 with equal sides, 1 that came before, 1 with more than 3 times the words on one "
        "side, 1 of more than 6 words"
    ]
    with pytest.raises(DataError, match="0 pairs; left out: 6 of fewer than 9 words: nothing is left"):
        open_parallel(_files(path, min_words=9))


def test_sentences_are_put_aside_for_scores(tmp_path):
    rows = [{"source": f"sentence {n % 70}", "target": f"Satz {n}"} for n in range(140)]
    path = _write(tmp_path / "data.jsonl", rows)
    spec = _files(path, eval_fraction=0.1, seed=3)
    train, validation, test = (open_parallel(spec, split) for split in ("train", "validation", "test"))
    assert (len(train), len(validation)) == (126, 14)
    assert _all(validation) == _all(test)
    assert not {pair[0] for pair in _all(train)} & {pair[0] for pair in _all(test)}
    assert sorted(_all(train) + _all(test)) == sorted((row["source"], row["target"]) for row in rows)
    assert _all(open_parallel(_files(path, eval_fraction=0.1, seed=4), "test")) != _all(test)
    assert _all(open_parallel(_files(path, eval_fraction=0.1, seed=3), "test")) == _all(test)
    turned = _write(tmp_path / "turned.jsonl", [{"source": row["target"], "target": row["source"]} for row in rows])
    both = [
        open_parallel(_files(one, eval_fraction=0.1, src_lang=src, tgt_lang=tgt), "test")
        for one, src, tgt in ((path, "en", "fr"), (turned, "fr", "en"))
    ]
    assert sorted(_all(both[0])) == sorted((target, source) for source, target in _all(both[1]))
    with pytest.raises(DataError, match="has no pairs for split 'test': set data.eval_path or data.eval_fraction"):
        open_parallel(_files(path), "test")
    single = _write(tmp_path / "single.jsonl", _rows(1))
    with pytest.raises(DataError, match="one sentence cannot be split"):
        open_parallel(_files(single, eval_fraction=0.1))


def test_own_files_for_scores_and_limits(tmp_path):
    path, own = _write(tmp_path / "data.jsonl", _rows(30)), _write(tmp_path / "own.jsonl", _rows(11))
    spec = _files(path, eval_path=own, limit=20, eval_limit=3)
    assert [len(open_parallel(spec, split)) for split in ("train", "validation", "test")] == [20, 3, 3]
    assert [pair[0] for pair in _all(open_parallel(spec, "test"))] == ["a sentence 0", "a sentence 5", "a sentence 10"]
    aligned = _aligned(tmp_path, "one\ntwo\n", "eins\nzwei\n")
    spec = ParallelConfig(
        kind="aligned",
        source_path=aligned.source_path,
        target_path=aligned.target_path,
        eval_source_path=aligned.target_path,
        eval_target_path=aligned.source_path,
    )
    assert (_all(open_parallel(spec))[1], _all(open_parallel(spec, "test"))[1]) == (("two", "zwei"), ("zwei", "two"))


def test_scenes_and_several_languages_in_one_run(tmp_path):
    assert open_parallel(ParallelConfig(size=50))[7] == SceneTranslations("train", 50)[7]
    assert open_parallel(ParallelConfig(seed=2), "heldout")[7] == SceneTranslations("heldout", 1000, 2)[7]
    assert len(open_parallel(ParallelConfig(size=50, limit=9))) == 9
    path = _write(tmp_path / "data.jsonl", _rows(5))
    spec = ParallelConfig(
        kind="parts",
        parts=[
            ParallelPart(size=30, tgt_lang="en"),
            ParallelPart(kind="files", path=path, tgt_lang="xx", eval_fraction=0.4),
        ],
    )
    source = open_parallel(spec)
    assert (len(source), source.name) == (33, f"scenes/train + {path}")
    assert [(source[n].src_lang, source[n].tgt_lang) for n in (0, 31)] == [("de", "en"), (None, "xx")]
    with pytest.raises(DataError, match="data.kind=files has no split 'heldout'"):
        open_parallel(spec, "heldout")
    with pytest.raises(DataError, match="unknown split 'dev'"):
        open_parallel(spec, "dev")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"kind": "files"}, "data.kind=files needs data.path"),
        ({"kind": "aligned"}, "data.kind=aligned needs data.source_path and data.target_path"),
        ({"kind": "hub"}, "data.kind=hub needs data.path"),
        ({"kind": "files", "path": "none.csv"}, "none.csv: no such file; set data.path"),
        ({"kind": "files", "path": "data.txt"}, r"unknown kind of table '\.txt'"),
        (
            {"kind": "files", "path": "data.jsonl"},
            "data.jsonl has no column 'target', it has 'source', 'tgt'; nearest: 'tgt'; set data.columns.target",
        ),
        ({"kind": "files", "path": "header.csv"}, "header.csv is empty: no sentence pairs"),
        ({"kind": "files", "path": "empty.csv"}, "empty.csv is empty"),
        ({"kind": "aligned", "source_path": "data.txt", "target_path": "none.de"}, "none.de: no such file"),
        ({"kind": "aligned", "source_path": "empty.csv", "target_path": "data.txt"}, "empty.csv is empty: no lines"),
        ({"kind": "aligned", "source_path": ".", "target_path": "data.txt"}, "is a folder, not a file"),
    ],
)
def test_what_cannot_be_opened_is_named(tmp_path, monkeypatch, spec, message):
    monkeypatch.chdir(tmp_path)
    Path("data.txt").write_text("a\n")
    Path("data.jsonl").write_text('{"source": "a", "tgt": "b"}\n')
    Path("header.csv").write_text("source,target\n")
    Path("empty.csv").write_text("")
    with pytest.raises(DataError, match=message):
        open_parallel(ParallelConfig(**spec))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"kind": "web"}, "data.kind 'web' is unknown: use one of scenes, office-help, files, aligned, hub, gettext"),
        ({"eval_fraction": 1.0}, "data.eval_fraction must be at least 0 and below 1"),
        ({"max_bad_fraction": 2.0}, "data.max_bad_fraction must lie between 0 and 1"),
        ({"kind": "files", "min_words": 5, "max_words": 3}, "data.max_words must be 5 or more, not 3"),
        ({"kind": "files", "max_ratio": 0.5}, "data.max_ratio must be 1 or more, not 0.5"),
        ({"max_words": 3}, "data.max_words is for other people's text, not for kind scenes"),
        ({"limit": 0}, "data.limit must be 1 or more, not 0"),
        ({"kind": "scenes", "path": "x"}, "data.path is x, but data.kind is scenes: sentences on them are made; set"),
        ({"kind": "hub", "eval_path": "x"}, "data.eval_path is for kinds files and gettext, not hub"),
        ({"source_path": "x"}, "data.source_path is for kind aligned, not scenes"),
        ({"kind": "aligned", "path": "x"}, "data.kind=aligned has two files"),
        ({"kind": "aligned", "source_path": "x"}, "data.source_path and data.target_path belong together: set both"),
        ({"kind": "parts"}, "data.kind=parts and data.parts belong together"),
        ({"parts": [ParallelPart()]}, "data.kind=parts and data.parts belong together"),
        ({"kind": "parts", "parts": [ParallelPart()], "seed": 3}, "data.seed beside data.parts changes nothing"),
    ],
)
def test_wrong_settings_are_refused(spec, message):
    with pytest.raises(ConfigError, match=message):
        ParallelConfig(**spec)


def test_settings_come_from_yaml(tmp_path):
    path = tmp_path / "data.yaml"
    path.write_text(
        "kind: parts\nlanguage_codes: {de: deu_Latn}\nparts:\n- kind: scenes\n  size: 7\n- kind: files\n  path: x.tsv\n"
        "  columns: {source: en}\n"
    )
    spec = load_config(ParallelConfig, path)
    assert [part.kind for part in spec.parts] == ["scenes", "files"]
    assert (spec.parts[1].columns.source, spec.language_codes) == ("en", {"de": "deu_Latn"})
    again = tmp_path / "again.yaml"
    again.write_text(to_yaml(spec))
    assert load_config(ParallelConfig, again) == spec
    with pytest.raises(ConfigError, match="sise"):
        load_config(ParallelConfig, None, ["sise=3"])


def test_alignments_are_checked_when_opened(tmp_path):
    rows = [{"source": "a ring", "target": "ein Ring", "links": links} for links in ("0-0", "0-0 1-2", "0:0", [[0]])]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = open_parallel(_files(path, columns=ParallelColumns(alignment="links"), max_bad=3))
    assert (len(source), source.num_bad) == (1, 3)
    with pytest.raises(DataError, match="line 2: alignment 1-2 points past the words, of which there are 2 and 2"):
        open_parallel(_files(path, columns=ParallelColumns(alignment="links"), max_bad=0))


def test_tables_hold_no_python_object_per_line(tmp_path):
    count = 70_001  # more than a chunk
    spec = _aligned(tmp_path, "".join(f"s {n}\n" for n in range(count)), "".join(f"t {n}\n" for n in range(count)))
    source = open_parallel(spec)
    assert len(source) == count
    assert source.table.nbytes < 100 * count
    picked = np.random.default_rng(0).integers(0, count, 13).tolist()
    assert [(pair.source, pair.target) for pair in source.pairs(picked)] == [(f"s {n}", f"t {n}") for n in picked]
