"""Sentence pairs from shards: the same as from a table, with substitutes for bad ones, or counted in one pass."""

from __future__ import annotations

import functools
import json
import logging
import pickle

import numpy as np
import pytest

from mmattn.config.load import load_config
from mmattn.data import stream_pairs
from mmattn.data.parallel import open_parallel, pair_builder
from mmattn.data.parallel_spec import ParallelColumns, ParallelConfig, ParallelPart
from mmattn.data.stream_pairs import StreamedPairs, measure_pairs
from mmattn.data.translation_tokenizer import train_marian_tokenizer
from mmattn.data.translation_tokens import PairTokenizer, token_lengths
from mmattn.errors import ConfigError, DataError, RunError
from tests.data.shards import pair_rows, write_csv, write_jsonl, write_parquet


@functools.cache
def marian_tokenizer():
    texts = [text for row in pair_rows(0, 200) for text in row.values()]
    return train_marian_tokenizer([*texts, "one many words"], "bpe", 300)


def config(tmp_path, path, **options) -> ParallelConfig:
    values = {"kind": "files", "streaming": True, "path": str(path), "index_folder": str(tmp_path / "index")}
    return ParallelConfig(**{**values, "window": 40, "blocks_at_once": 4, **options})


def opened(tmp_path, path, **options) -> StreamedPairs:
    source = open_parallel(config(tmp_path, path, **options))
    assert isinstance(source, StreamedPairs)
    return source


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "tsv"])
def test_the_pairs_are_those_of_the_table(tmp_path, kind):
    rows = [{"source": f" s{n} ", "target": f"t{n}", "links": "0-0", "lang": "de"} for n in range(53)]
    write = {"parquet": write_parquet, "jsonl": write_jsonl, "tsv": write_csv}[kind]
    path = write(tmp_path / f"a.{kind}", rows)
    columns = ParallelColumns(alignment="links", tgt_lang="lang")
    streamed = opened(tmp_path, path, src_lang="en", columns=columns)
    table = open_parallel(
        ParallelConfig(kind="files", path=str(path), src_lang="en", columns=columns, eval_fraction=0.0)
    )
    assert streamed.pairs([40, 3, 3]) == table.pairs([40, 3, 3])
    assert len(streamed) == len(table) == 53
    assert streamed[7] == table[7]
    assert pickle.loads(pickle.dumps(streamed)).pairs([5]) == table.pairs([5])


def test_texts_by_language(tmp_path):
    rows = [{"translation": {"en": f"e{n}", "de": f"d{n}", "fr": "x"}} for n in range(11)]
    source = opened(tmp_path, write_parquet(tmp_path / "a.parquet", rows), src_lang="de", tgt_lang="en")
    assert (source[4].source, source[4].target, source[4].src_lang) == ("d4", "e4", "de")


def test_a_bad_pair_is_replaced_by_the_same_other_one(tmp_path, caplog):
    rows = pair_rows(0, 40)
    rows[7]["target"] = "  "
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    path.write_text(path.read_text().replace('"the number 9 stands here"', '"the number 9'))
    source = opened(tmp_path, path)
    with caplog.at_level(logging.WARNING):
        found = source.pairs(range(40))
    assert [pair.source for number, pair in enumerate(found) if number not in (7, 9)] == [
        row["source"] for number, row in enumerate(rows) if number not in (7, 9)
    ]
    assert found[7] == opened(tmp_path, path)[7] != found[8]
    assert "a.jsonl line 8: the target is empty" in caplog.text
    assert "a.jsonl line 10: not JSON" in caplog.text
    with pytest.raises(RunError, match=r"too many records cannot be read, 2 so far, 1 allowed \(data\.max_bad"):
        opened(tmp_path, path, max_bad=1).pairs(range(40))


def test_what_a_check_finds_wrong_is_replaced_too(tmp_path):
    source = opened(tmp_path, write_jsonl(tmp_path / "a.jsonl", pair_rows(0, 40)), max_bad=9)
    checked = source.checked(lambda pairs: ["is odd" if "1" in pair.source else None for pair in pairs])
    assert not any("1" in pair.source for pair in checked.pairs([1, 2, 11, 21, 31]))
    assert "1" in source[1].source


def measured(tmp_path, source, limits=(512, 512), refuse=False, tokenizer=None, **options):
    tokenizer = tokenizer or PairTokenizer(marian_tokenizer())
    spec = source.spec
    limit = {"max_source_length": limits[0], "max_target_length": limits[1]}
    return measure_pairs(source, pair_builder(spec, source.name), tokenizer, "tiny", refuse=refuse, **limit)


def test_tokens_are_counted_once_for_all_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(stream_pairs, "_CHUNK", 17)
    rows = pair_rows(0, 53)
    rows[5]["source"] = ""
    rows[11]["source"] = rows[11]["target"] = "one"
    rows[50]["target"] = "many words " * 20
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    options = {"min_words": 2, "max_bad": 3}
    found = measured(tmp_path, opened(tmp_path, path, **options), (40, 40))
    assert (found.num_bad, found.num_dropped, found.num_long, found.num_aligned) == (1, 1, 1, 0)
    assert found.num_left_out == 3
    assert np.flatnonzero(~found.lengths.any(axis=1)).tolist() == [5, 11, 50]
    kept = [number for number in range(53) if number not in (5, 11, 50)]
    table = open_parallel(ParallelConfig(kind="files", path=str(path), eval_fraction=0.0, min_words=2))
    expected = token_lengths(table, PairTokenizer(marian_tokenizer())).lengths
    keep = [number for number in range(len(expected)) if number != 48]  # the long one, in a table without two
    assert np.array_equal(found.lengths[kept], expected[keep])
    assert isinstance(found.lengths, np.memmap)

    class Refusing(PairTokenizer):
        def __call__(self, pairs):
            raise AssertionError("counted again")

    again = measured(tmp_path, opened(tmp_path, path, **options), (40, 40), tokenizer=Refusing(marian_tokenizer()))
    assert np.array_equal(again.lengths, found.lengths)
    assert again.num_left_out == 3
    with pytest.raises(
        DataError, match=r"1 of 53 lines so far are bad, 0 allowed .*the last: .*a\.jsonl line 6: the source is empty$"
    ):
        measured(tmp_path, opened(tmp_path, path, **{**options, "max_bad": 0}), (40, 40))
    for changed in ({"min_words": 1}, {"columns": ParallelColumns(source="target", target="source")}):
        with pytest.raises(AssertionError, match="counted again"):
            measured(
                tmp_path,
                opened(tmp_path, path, **{**options, **changed}),
                (40, 40),
                tokenizer=Refusing(marian_tokenizer()),
            )


@pytest.mark.parametrize("limit", [{"max_bad": 1}, {"max_bad_fraction": 0.0}])
def test_a_stricter_limit_names_what_kept_counts_were_made_without(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(stream_pairs, "_CHUNK", 17)
    path = write_jsonl(tmp_path / "a.jsonl", pair_rows(0, 53))
    lines = path.read_text().splitlines(keepends=True)
    lines[7], lines[29], lines[31] = '{"source": "x", "target": ""}\n', "[1]\n", "{\n"
    path.write_text("".join(lines))
    made = measured(tmp_path, opened(tmp_path, path, max_bad=3))
    assert (made.num_bad, made.last_bad) == (3, 31)
    again = measured(tmp_path, opened(tmp_path, path, max_bad=4))
    assert (again.num_bad, again.last_bad) == (3, 31)
    with pytest.raises(DataError, match=r"3 of 53 lines so far are bad, 1 allowed .*line 32: not JSON"):
        measured(tmp_path, opened(tmp_path, path, **limit))


def test_tokens_are_counted_again_when_quote_marks_are_text(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text("source\ttarget\n" + 'one\t"many words"\n' * 5)
    quoted = measured(tmp_path, opened(tmp_path, path))
    plain = measured(tmp_path, opened(tmp_path, path, quoting=False))
    assert (plain.lengths[:, 1] > quoted.lengths[:, 1]).all()
    assert (plain.lengths[:, 0] == quoted.lengths[:, 0]).all()


def test_long_pairs_may_be_refused(tmp_path):
    rows = pair_rows(0, 23)
    rows[9]["target"] = "many words " * 20
    source = opened(tmp_path, write_jsonl(tmp_path / "a.jsonl", rows))
    with pytest.raises(
        DataError, match=r"a\.jsonl line 10 has \d+ source and \d+ target tokens, allowed are 40 and 40"
    ):
        measured(tmp_path, source, (40, 40), refuse=True)


def test_several_languages_and_a_tokenizer_of_one(tmp_path):
    rows = [{**row, "lang": "de" if n % 2 else "fr"} for n, row in enumerate(pair_rows(0, 23))]
    source = opened(tmp_path, write_jsonl(tmp_path / "a.jsonl", rows), columns=ParallelColumns(tgt_lang="lang"))
    with pytest.raises(DataError, match=r"has several target languages \(de, fr\)"):
        measured(tmp_path, source)


def test_scores_come_from_a_file_of_their_own(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", pair_rows(0, 23))
    other = write_jsonl(tmp_path / "b.jsonl", pair_rows(100, 3))
    assert len(open_parallel(config(tmp_path, path, eval_path=str(other)), "validation")) == 3
    with pytest.raises(DataError, match="streamed data has no pairs for split 'test': set data.eval_path"):
        open_parallel(config(tmp_path, path), "test")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"streaming": False, "window": 40}, r"data\.window is for data\.streaming=true: set that, or leave window"),
        ({"streaming": False, "shards": ["x"]}, r"data\.shards is for data\.streaming=true"),
        (
            {"kind": "hub"},
            r"data\.streaming is for kind files, not hub \(download it, and give its files as kind files",
        ),
        ({"kind": "scenes", "path": None}, r"data\.streaming is for kind files, not scenes"),
        ({"path": None}, r"data\.streaming needs data\.path or data\.shards: set one of them"),
        ({"shards": ["x"]}, r"data\.streaming needs data\.path or data\.shards: set one of them"),
        ({"blocks_at_once": 0}, r"data\.blocks_at_once 0 places: both must be 1 or more"),
        ({"window": 3, "blocks_at_once": 4}, r"data\.window 3 examples from .* and window the larger"),
        ({"eval_fraction": 0.2}, r"data\.eval_fraction changes nothing with data\.streaming=true: leave it out"),
        ({"drop_duplicates": True}, r"data\.drop_duplicates needs all pairs in memory"),
    ],
)
def test_settings_that_do_not_go_together(tmp_path, options, message):
    values = {"kind": "files", "streaming": True, "path": "x.jsonl"}
    with pytest.raises(ConfigError, match=message):
        ParallelConfig(**{**values, **options})


def test_parts_are_not_streamed():
    with pytest.raises(ConfigError, match=r"data\.parts cannot be streamed: .*data\.columns\.tgt_lang"):
        ParallelConfig(kind="parts", parts=[ParallelPart(kind="files", path="x", streaming=True)])


def test_missing_columns_are_named_with_their_shard(tmp_path):
    write_parquet(tmp_path / "a.parquet", pair_rows(0, 3))
    write_parquet(tmp_path / "b.parquet", [{"source": "x", "tgt": "y"}])
    with pytest.raises(DataError, match=r"b\.parquet has no column 'target', it has 'source', 'tgt'"):
        opened(tmp_path, tmp_path / "*.parquet")
    (tmp_path / "c.jsonl").write_text(json.dumps({"en": 1}) + "\n")
    with pytest.raises(DataError, match=r"c\.jsonl has no column 'source', it has 'en'; set data\.columns\.source"):
        opened(tmp_path, tmp_path / "c.jsonl")
    (tmp_path / "d.jsonl").write_text("x\n" * 5)
    with pytest.raises(DataError, match=r"d\.jsonl: none of the first rows can be read"):
        opened(tmp_path, tmp_path / "d.jsonl")


def test_the_settings_are_those_of_a_config_file(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", pair_rows(0, 3))
    (tmp_path / "my.yaml").write_text(f"kind: files\nstreaming: true\nshards: [{path}]\nwindow: 50\n")
    loaded = load_config(ParallelConfig, str(tmp_path / "my.yaml"))
    assert (loaded.shard_paths, loaded.window, loaded.blocks_at_once) == ([str(path)], 50, 16)
