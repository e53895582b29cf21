"""Pictures with texts from shards: the same records as from a table, tars in webdataset's form, and bad rows."""

from __future__ import annotations

import json

import numpy as np
import pytest

from mmattn.config.load import load_config
from mmattn.data.captions import known_captions
from mmattn.data.readers import open_image_text
from mmattn.data.records import read_texts
from mmattn.data.spec import ColumnConfig, DataConfig
from mmattn.data.stream_rows import stream_layout
from mmattn.errors import ConfigError, DataError, RunError
from tests.data.shards import png, write_csv, write_jsonl, write_parquet, write_tar


def config(tmp_path, path, **options) -> DataConfig:
    values = {"kind": "files", "streaming": True, "path": str(path), "index_folder": str(tmp_path / "index")}
    return DataConfig(**{**values, **options})


def rows(count: int, **others) -> list[dict]:
    return [{"image": png(number), "text": f"picture {number}", **others} for number in range(count)]


def same(one, other) -> bool:
    return np.array_equal(one.image, other.image) and one.texts == other.texts


def test_parquet_with_bytes_as_a_table(tmp_path):
    written = [{"image": {"bytes": png(n), "path": f"{n}.png"}, "text": [f"a {n}", f"b {n}"]} for n in range(23)]
    path = write_parquet(tmp_path / "a.parquet", written)
    streamed = open_image_text(config(tmp_path, path))
    table = open_image_text(DataConfig(kind="files", path=str(path), eval_fraction=0.0))
    assert len(streamed) == len(table) == 23
    assert all(same(streamed[number], table[number]) for number in (0, 7, 22))
    assert read_texts(streamed, [3, 9]) == read_texts(table, [3, 9])
    assert streamed[4].id == f"{path} row 5 (4.png)"


def test_texts_are_read_without_pictures(tmp_path, monkeypatch):
    path = write_parquet(tmp_path / "a.parquet", rows(23))
    streamed = open_image_text(config(tmp_path, path))
    asked = []
    source = streamed.source.streamed_rows
    original = source.rows
    monkeypatch.setattr(source, "rows", lambda indices, columns: asked.append(columns) or original(indices, columns))
    assert known_captions(streamed) == [f"picture {number}" for number in range(23)]
    assert asked == [["text"]]


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_paths_start_at_the_shard(tmp_path, kind):
    (tmp_path / "my data").mkdir()
    for number in range(3):
        (tmp_path / "my data" / f"{number}.png").write_bytes(png(number))
    written = [{"image": f"{number}.png", "text": f"t {number}", "q": "what?"} for number in range(3)]
    path = {"jsonl": write_jsonl, "csv": write_csv}[kind](tmp_path / "my data" / f"a.{kind}", written)
    streamed = open_image_text(config(tmp_path, path, columns=ColumnConfig(question="q")))
    record = streamed[2]
    assert record.image[0, 0].tolist() == [2, 4, 200]
    assert (record.texts[0].text, record.texts[0].question, record.texts[0].kind) == ("t 2", "what?", "answer")


def test_an_image_folder_is_streamed_by_its_metadata(tmp_path):
    (tmp_path / "0.png").write_bytes(png(0))
    write_jsonl(tmp_path / "metadata.jsonl", [{"file_name": "0.png", "text": "zero"}])
    streamed = open_image_text(config(tmp_path, tmp_path, kind="imagefolder"))
    assert streamed[0].texts[0].text == "zero"


def test_tars(tmp_path):
    examples = [
        ("a", {"jpg": png(0), "txt": b"zero"}),
        ("b", {"png": png(1), "txt": b"one", "json": b'{"kind": "shape"}'}),
    ]
    path = write_tar(tmp_path / "a.tar", examples)
    streamed = open_image_text(config(tmp_path, path, eval_path=str(path)))
    assert [streamed[number].texts[0].text for number in range(2)] == ["zero", "one"]
    assert streamed[1].image[0, 0].tolist() == [1, 2, 200]
    assert streamed[1].id == f"{path} example 2 (b)"
    assert len(open_image_text(config(tmp_path, path, eval_path=str(path)), "test")) == 2
    named = config(tmp_path, path, columns=ColumnConfig(image="png"))
    with pytest.raises(DataError, match=r"a\.tar has no column 'png', it has 'jpg', 'txt'"):
        open_image_text(named)
    bare = write_tar(tmp_path / "b.tar", [("a", {"txt": b"zero"})])
    with pytest.raises(DataError, match=r"the first example holds no picture \(jpg, jpeg, png, webp\), only \['txt'\]"):
        open_image_text(config(tmp_path, bare))
    texts = write_tar(tmp_path / "c.tar", [("a", {"jpg": png(1), "json": b'{"text": "in json"}', "txt": b"beside"})])
    assert open_image_text(config(tmp_path, texts))[0].texts[0].text == "in json"
    json_first = [("first", {"jpg": png(1), "json": b'{"text": "in json"}'}), *examples]
    mixed = open_image_text(config(tmp_path, write_tar(tmp_path / "d.tar", json_first)))
    assert [texts[0].text for texts in read_texts(mixed, range(3))] == ["in json", "zero", "one"]
    assert [mixed[number].texts[0].text for number in range(3)] == ["in json", "zero", "one"]
    with pytest.raises(DataError, match=r"has no file 'image' in its first example: set data\.columns\.image=null"):
        open_image_text(config(tmp_path, path, columns=ColumnConfig(image="image")))


def test_bad_rows_are_replaced_until_there_are_too_many(tmp_path):
    written = rows(23)
    written[3]["image"] = b"no picture"
    written[4]["text"] = " "
    path = write_parquet(tmp_path / "a.parquet", written)
    streamed = open_image_text(config(tmp_path, path, max_bad=2))
    assert same(streamed[3], open_image_text(config(tmp_path, path, max_bad=2))[3])
    assert streamed[4].texts[0].text.startswith("picture")
    assert "a.parquet row 4: not a picture" in streamed.bad[3]
    assert "a.parquet row 5: column 'text' holds no text" in streamed.bad[4]
    assert read_texts(streamed.source, [3, 4])[1] == ()
    few = open_image_text(config(tmp_path, path, max_bad=1))
    with pytest.raises(RunError, match="too many records cannot be read, 2 so far, 1 allowed"):
        [few[number] for number in (3, 4)]


def test_what_is_no_text_makes_a_bad_row(tmp_path):
    wrong = [{"raw": "a"}, ["a", ["b"]], "\ud83d"]
    text = "".join(json.dumps({"image": "a.png", "text": value}) + "\n" for value in [*wrong, float("nan"), 7])
    (tmp_path / "a [1].jsonl").write_text(text)
    (tmp_path / "a.png").write_bytes(png(1))
    streamed = open_image_text(config(tmp_path, tmp_path / "a [1].jsonl"))
    kinds = ("dict, not text", "list, not text", "half of a surrogate pair", "no text")
    bad = streamed.check()
    assert all(f"line {number + 1}: column 'text' holds {kind}" in bad[number] for number, kind in enumerate(kinds))
    assert [[item.text for item in items] for items in read_texts(streamed, range(5))] == [[], [], [], [], ["7"]]


def test_a_shard_that_is_gone_is_no_bad_row(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", rows(23))
    streamed = open_image_text(config(tmp_path, path))
    path.unlink()
    with pytest.raises(RunError, match=r"shard .*a\.parquet cannot be read any more"):
        streamed[3]


def test_the_layout_is_found_through_what_skips_and_checks(tmp_path):
    streamed = open_image_text(config(tmp_path, write_parquet(tmp_path / "a.parquet", rows(23)), limit=20))
    layout = stream_layout(streamed)
    assert layout is not None
    assert (int(layout.bounds[-1]), layout.window, layout.blocks_at_once) == (20, 1000, 16)
    assert "a.parquet" in layout.shards


def test_scores_come_from_a_file_of_their_own(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", rows(23))
    other = write_parquet(tmp_path / "b.parquet", rows(3))
    assert len(open_image_text(config(tmp_path, path, eval_path=str(other)), "validation")) == 3
    with pytest.raises(DataError, match="streamed data has no records for split 'test': set data.eval_path"):
        open_image_text(config(tmp_path, path), "test")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"streaming": False, "blocks_at_once": 3}, r"data\.blocks_at_once is for data\.streaming=true"),
        ({"kind": "scenes", "path": None}, r"data\.streaming is for kind files and imagefolder, not scenes"),
        ({"columns": ColumnConfig(group="id")}, r"data\.columns\.group changes nothing with data\.streaming=true"),
        ({"eval_fraction": 0.3}, r"data\.eval_fraction changes nothing with data\.streaming=true"),
    ],
)
def test_settings_that_do_not_go_together(options, message):
    with pytest.raises(ConfigError, match=message):
        DataConfig(**{"kind": "files", "path": "x.parquet", "streaming": True, **options})


def test_plain_configs_are_as_before(tmp_path):
    (tmp_path / "my.yaml").write_text("kind: files\npath: x.csv\n")
    loaded = load_config(DataConfig, str(tmp_path / "my.yaml"))
    assert (loaded.streaming, loaded.window) == (False, 1000)
