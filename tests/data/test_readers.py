"""The user's own data: JSONL, CSV, Parquet, image folders and hub layouts, and what is said when something is wrong."""

from __future__ import annotations

import csv
import io
import json
import pickle
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from mmattn.config.load import load_config
from mmattn.data.readers import open_image_text
from mmattn.data.records import ImageTextSource, read_texts
from mmattn.data.scenes import SceneDataset
from mmattn.data.spec import ColumnConfig, DataConfig
from mmattn.errors import ConfigError, DataError


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def _picture(number: int) -> Image.Image:
    return Image.new("RGB", (5 + number, 7), (number, 2 * number, 200))


def _bytes(number: int) -> bytes:
    stream = io.BytesIO()
    _picture(number).save(stream, "PNG")
    return stream.getvalue()


def _pictures(folder: Path, count: int) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        (folder / f"{number}.png").write_bytes(_bytes(number))
    return [f"{number}.png" for number in range(count)]


def _jsonl(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def _csv(path: Path, rows: list[dict], delimiter: str = ",") -> str:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def _files(path: str, **options) -> DataConfig:
    options = {"eval_fraction": 0.0, **options}
    return DataConfig(kind="files", path=path, **options)


@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv", "parquet"])
def test_tables_with_paths_relative_to_the_file(tmp_path, kind):
    names = _pictures(tmp_path / "pictures", 3)
    rows = [{"image": f"pictures/{name}", "text": f"number {name[0]}"} for name in names]
    if kind == "jsonl":
        path = _jsonl(tmp_path / "data.jsonl", rows)
    elif kind == "parquet":
        path = str(tmp_path / "data.parquet")
        datasets.Dataset.from_list(rows).to_parquet(path)
    else:
        path = _csv(tmp_path / f"data.{kind}", rows, "\t" if kind == "tsv" else ",")
    source = open_image_text(_files(path))
    assert isinstance(source, ImageTextSource)
    assert (source.name, len(source)) == (path, 3)
    for number in range(3):
        assert np.array_equal(source[number].image, np.asarray(_picture(number)))
        assert [item.text for item in source[number].texts] == [f"number {number}"]
        assert source[number].texts[0].question is None
        assert source[number].id.endswith(f"pictures/{number}.png")
    assert pickle.loads(pickle.dumps(source))[1].texts == source[1].texts


def test_columns_are_mapped_and_rows_of_one_picture_become_one_record(tmp_path):
    _pictures(tmp_path / "elsewhere", 2)
    rows = [
        {"file": "0.png", "q": "what color?", "a": "red", "type": "color"},
        {"file": "1.png", "q": "how many?", "a": 2, "type": "count"},
        {"file": "0.png", "q": "is there a dog?", "a": "no", "type": "exists"},
        {"file": "1.png", "q": "skip me", "a": None, "type": "count"},
    ]
    columns = ColumnConfig(image="file", text="a", question="q", kind="type")
    path = _jsonl(tmp_path / "data.jsonl", [{**row, "a": None if row["a"] is None else str(row["a"])} for row in rows])
    source = open_image_text(_files(path, columns=columns, image_root=str(tmp_path / "elsewhere")))
    assert len(source) == 2
    assert [(item.question, item.text, item.kind) for item in source[0].texts] == [
        ("what color?", "red", "color"),
        ("is there a dog?", "no", "exists"),
    ]
    assert [(item.text, item.kind) for item in source[1].texts] == [("2", "count")]
    assert read_texts(source, [0, 1]) == [source[0].texts, source[1].texts]


def test_several_captions_in_a_list(tmp_path):
    _pictures(tmp_path, 1)
    path = _jsonl(tmp_path / "data.jsonl", [{"image": "0.png", "captions": ["one", " two ", ""]}])
    source = open_image_text(_files(path, columns=ColumnConfig(text="captions")))
    assert [item.text for item in source[0].texts] == ["one", "two"]


@pytest.mark.parametrize("form", ["feature", "struct", "binary"])
def test_embedded_images(tmp_path, form):
    path = str(tmp_path / "data.parquet")
    values = [_bytes(1), _bytes(2)]
    if form == "feature":
        features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
        table = datasets.Dataset.from_dict({"image": [_picture(1), _picture(2)], "text": ["a", "b"]}, features=features)
    else:
        cells = [{"bytes": data, "path": None} for data in values] if form == "struct" else values
        table = datasets.Dataset.from_dict({"image": cells, "text": ["a", "b"]})
    table.to_parquet(path)
    source = open_image_text(_files(path))
    assert len(source) == 2
    assert np.array_equal(source[1].image, np.asarray(_picture(2)))
    assert "row 2" in source[1].id


def test_what_stands_in_a_csv_file_is_text(tmp_path):
    _pictures(tmp_path, 1)
    written = ["007", "2", "NA", "None", "nan", "true", "1e3", "2024-01-01"]
    rows = [{"image": "0.png", "text": text, "q": "what?", "kind": "", "": ""} for text in [*written, ""]]
    path = _csv(tmp_path / "data.csv", rows)
    source = open_image_text(_files(path, columns=ColumnConfig(question="q", kind="kind")))
    assert [item.text for item in source[0].texts] == written
    assert {item.kind for item in source[0].texts} == {"answer"}


def test_rows_that_name_no_group_or_no_picture_stay_apart(tmp_path):
    _pictures(tmp_path, 3)
    rows = [
        {"image": name, "text": "a", "group": group}
        for name, group in zip(["0.png", "1.png", "0.png"], ["", None, "x"], strict=True)
    ]
    path = _jsonl(tmp_path / "data.jsonl", [*rows, *({"image": "", "text": "b"} for _ in range(2))])
    source = open_image_text(_files(path, columns=ColumnConfig(group="group"), max_bad=9))
    assert [source.source.rows[number] for number in range(len(source))] == [[0], [1], [2], [3], [4]]
    assert [Path(source[number].id).name for number in range(2)] == ["0.png", "1.png"]
    assert len(source.check()) == 2


def test_a_file_with_the_signs_of_a_glob_in_its_name(tmp_path):
    _pictures(tmp_path / "cats [2024]", 1)
    path = _jsonl(tmp_path / "cats [2024]" / "set [1]*.jsonl", [{"image": "0.png", "text": "a"}])
    assert len(open_image_text(_files(path))) == 1


def test_globs_and_limit(tmp_path):
    _pictures(tmp_path, 4)
    _jsonl(tmp_path / "part-0.jsonl", [{"image": "0.png", "text": "a"}, {"image": "1.png", "text": "b"}])
    _jsonl(tmp_path / "part-1.jsonl", [{"image": "2.png", "text": "c"}, {"image": "3.png", "text": "d"}])
    source = open_image_text(_files(str(tmp_path / "part-*.jsonl"), limit=3))
    assert [source[number].texts[0].text for number in range(3)] == ["a", "b", "c"]
    assert len(source) == 3


def test_records_are_put_aside_for_scores_by_picture(tmp_path):
    _pictures(tmp_path, 20)
    rows = [{"image": f"{number % 20}.png", "text": f"t{number}"} for number in range(40)]
    spec = _files(_jsonl(tmp_path / "data.jsonl", rows), eval_fraction=0.2)
    train, test = open_image_text(spec), open_image_text(spec, "test")
    assert (len(train), len(test)) == (16, 4)
    ids = [{source[number].id for number in range(len(source))} for source in (train, test)]
    assert ids[0].isdisjoint(ids[1])
    assert {item.text for texts in read_texts(train, range(16)) for item in texts}.isdisjoint(
        item.text for texts in read_texts(test, range(4)) for item in texts
    )
    assert read_texts(open_image_text(spec, "validation"), range(4)) == read_texts(test, range(4))
    other = _jsonl(tmp_path / "other.jsonl", [{"image": "0.png", "text": "x"}])
    spec = _files(spec.path or "", eval_path=other, eval_fraction=0.2)
    assert (len(open_image_text(spec)), len(open_image_text(spec, "test"))) == (20, 1)


def test_image_folder_with_metadata_and_split_folders(tmp_path):
    for split, count in (("train", 3), ("val", 2)):
        names = _pictures(tmp_path / split, count)
        rows = [{"file_name": name, "text": f"{split} {name[0]}"} for name in names]
        _csv(tmp_path / split / "metadata.csv", rows)
    spec = DataConfig(kind="imagefolder", path=str(tmp_path))
    train, test = open_image_text(spec), open_image_text(spec, "test")
    assert [len(train), len(test), len(open_image_text(spec, "validation"))] == [3, 2, 2]
    assert test[1].texts[0].text == "val 1"
    assert np.array_equal(test[1].image, np.asarray(_picture(1)))
    alone = DataConfig(kind="imagefolder", path=str(tmp_path / "train"))
    assert [len(open_image_text(alone)), len(open_image_text(alone, "test"))] == [2, 1]


def test_data_sets_saved_to_disk(tmp_path):
    table = datasets.Dataset.from_dict({"image": [_picture(1), _picture(2)], "text": ["a", "b"]})
    table.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": table, "dev": table.select([1])}).save_to_disk(tmp_path / "several")
    one, several = (DataConfig(kind="hub", path=str(tmp_path / name)) for name in ("one", "several"))
    assert [len(open_image_text(one)), len(open_image_text(one, "test"))] == [1, 1]
    assert [len(open_image_text(several)), len(open_image_text(several, "test"))] == [2, 1]
    assert open_image_text(several, "test")[0].texts[0].text == "b"


def test_hub_ids_through_a_folder_in_the_hubs_layout(tmp_path):
    (tmp_path / "data").mkdir()
    for split, count in (("train", 3), ("test", 2)):
        table = datasets.Dataset.from_dict(
            {"image": [_picture(number) for number in range(count)], "text": ["a"] * count}
        )
        table.to_parquet(str(tmp_path / "data" / f"{split}-00000-of-00001.parquet"))
    spec = DataConfig(kind="hub", path=str(tmp_path))
    train, validation = open_image_text(spec), open_image_text(spec, "validation")
    assert (len(train), len(validation)) == (3, 2)
    assert np.array_equal(train[2].image, np.asarray(_picture(2)))
    with pytest.raises(
        DataError, match=r"has no split 'dev', it has train, test; set data.train_split, data.eval_split"
    ):
        open_image_text(DataConfig(kind="hub", path=str(tmp_path), eval_split="dev"), "test")


def test_an_unknown_hub_id_is_one_line(monkeypatch, tmp_path):
    with pytest.raises(DataError, match="cannot be loaded with datasets") as caught:
        open_image_text(DataConfig(kind="hub", path=str(tmp_path / "no-such-set")))
    assert "\n" not in str(caught.value)


def test_scenes_by_config():
    spec = DataConfig(size=17, eval_size=5, image_size=48, max_objects=3, seed=4)
    train, heldout = open_image_text(spec), open_image_text(spec, "heldout")
    assert isinstance(train, SceneDataset)
    assert (len(train), len(heldout), train.image_size) == (17, 5, 48)


def _messages(tmp_path: Path) -> list[tuple[DataConfig, str]]:
    _pictures(tmp_path, 1)
    row = {"image": "0.png", "caption": "a", "width": 3}
    good = _jsonl(tmp_path / "good.jsonl", [row])
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "header.csv").write_text("image,text\n")
    (tmp_path / "broken.jsonl").write_text('{"image": "0.png", "text"\n')
    (tmp_path / "data.xlsx").write_text("x")
    (tmp_path / "bare").mkdir()
    blank = _jsonl(tmp_path / "blank.jsonl", [{"image": "0.png", "text": " "}])
    nested = _jsonl(tmp_path / "nested.jsonl", [{"image": "0.png", "text": {"raw": "a"}}])
    half = _jsonl(tmp_path / "half.jsonl", [{"image": "0.png", "text": "\ud83d"}])
    (tmp_path / "comma.csv").write_text("image,text\n0.png,a cat, on a sofa\n")
    return [
        (_files(nested), r"nested\.jsonl row 1: column 'text' holds dict, not text"),
        (_files(half), r"half\.jsonl line 1: half of a surrogate pair"),
        (
            _files(str(tmp_path / "comma.csv")),
            r"comma\.csv: its first row has 3 fields, and there are 2 columns; put q",
        ),
        (
            _files(str(tmp_path / "gone.jsonl")),
            r"gone\.jsonl: no such file; set data\.path to a JSONL, CSV or Parquet file",
        ),
        (_files(str(tmp_path / "x-*.jsonl")), r"x-\*\.jsonl: no such file"),
        (_files(str(tmp_path)), r": is a folder, not a file"),
        (
            _files(good),
            r"good\.jsonl has no column 'text', it has 'image', 'caption', 'width'; nearest: 'caption'; set data\.col",
        ),
        (
            _files(good, columns=ColumnConfig(image="images", text="caption")),
            r"has no column 'images', .*nearest: 'image'; set data\.columns\.image",
        ),
        (
            _files(good, columns=ColumnConfig(text="caption", question="q")),
            r"has no column 'q', .*set data\.columns\.question",
        ),
        (
            _files(good, columns=ColumnConfig(image="image", text="image")),
            r"good\.jsonl: data\.columns\.text names the column of the pictures, 'image': a column is one or the other",
        ),
        (_files(str(tmp_path / "empty.jsonl")), r"empty\.jsonl is empty: no rows"),
        (_files(str(tmp_path / "header.csv")), r"header\.csv is empty: no rows"),
        (_files(blank), r"blank\.jsonl is empty: column 'text' holds no text in any of 1 rows"),
        (_files(str(tmp_path / "broken.jsonl")), r"broken\.jsonl line 1: not JSON \("),
        (_files(str(tmp_path / "data.xlsx")), r"data\.xlsx: unknown kind of table '\.xlsx': use \.jsonl"),
        (DataConfig(kind="files"), r"data\.kind=files needs data\.path"),
        (DataConfig(kind="imagefolder", path=str(tmp_path / "none")), r"none: no such folder"),
        (
            DataConfig(kind="imagefolder", path=str(tmp_path / "bare")),
            r"bare holds none of metadata\.jsonl, metadata\.csv",
        ),
    ]


def test_wrong_data_is_one_clear_line(tmp_path):
    for spec, message in _messages(tmp_path):
        with pytest.raises(DataError, match=message) as caught:
            open_image_text(spec)
        assert "\n" not in str(caught.value)
        assert caught.value.exit_code == 2


def test_splits_that_are_not_there(tmp_path):
    _pictures(tmp_path, 1)
    path = _jsonl(tmp_path / "data.jsonl", [{"image": "0.png", "text": "a"}])
    for spec, split, message in (
        (_files(path), "heldout", "data.kind=files has no split 'heldout': use train, validation or test"),
        (_files(path), "dev", "unknown split 'dev': use one of train, validation, test, heldout"),
        (_files(path), "test", "has no records for split 'test': set data.eval_path or data.eval_fraction"),
        (_files(path, eval_fraction=0.5), "test", "one record cannot be split into training and evaluation"),
    ):
        with pytest.raises(DataError, match=message):
            open_image_text(spec, split)


def test_config_is_checked():
    config = load_config(DataConfig, None, ["kind=files", "path=a.jsonl", "columns.text=caption", "limit=3"])
    assert (config.columns.text, config.limit, config.eval_path) == ("caption", 3, None)
    for override, message in (
        ("kind=webdataset", "data.kind 'webdataset' is unknown: use one of scenes, stamps, files, imagefolder, hub"),
        ("eval_fraction=1.5", "data.eval_fraction must be at least 0 and below 1, not 1.5"),
        ("max_bad_fraction=-1", "data.max_bad_fraction must lie between 0 and 1"),
        ("limit=0", "data.limit must be 1 or more, not 0"),
        ("path=b.jsonl", "data.path is b.jsonl, but data.kind is scenes, which are drawn: set data.kind"),
        ("eval_path=b.jsonl", "data.eval_path is for kinds files and imagefolder, not scenes"),
        ("columns.txt=a", "txt"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_config(DataConfig, None, [override])
