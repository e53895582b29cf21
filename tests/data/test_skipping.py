"""Unreadable pictures are named, counted, replaced by always the same others, and stop the run when too many."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
from PIL import Image

from mmattn.data.readers import open_image_text
from mmattn.data.records import ImageTextRecord, TextItem, read_texts
from mmattn.data.skipping import SkippingSource, preview
from mmattn.data.spec import DataConfig
from mmattn.errors import DataError, RunError


class _Source:
    """Records 0 to size - 1, some of which cannot be read."""

    name = "pictures"

    def __init__(self, size: int, bad: set[int]) -> None:
        self.size, self.unreadable = size, bad

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> ImageTextRecord:
        if index in self.unreadable:
            raise DataError(f"{index}.png: damaged picture (cut short)")
        return ImageTextRecord(str(index), np.zeros((2, 2, 3), dtype=np.uint8), (TextItem(f"text {index}"),))


def test_a_bad_record_is_named_once_and_always_replaced_by_the_same(caplog):
    source = SkippingSource(_Source(50, {7, 8}), max_bad_fraction=0.1)
    with caplog.at_level(logging.WARNING):
        substitute = source[7].id
        assert source[7].id == substitute
    assert substitute not in ("7", "8")
    assert [record.getMessage() for record in caplog.records] == [
        "skipped a record of pictures: 7.png: damaged picture (cut short)"
    ]
    backwards = SkippingSource(_Source(50, {7, 8}), max_bad_fraction=0.1)
    assert [backwards[8].id, backwards[7].id] == [source[8].id, substitute][:2]
    assert source[9].id == "9"
    assert source.bad == {7: "7.png: damaged picture (cut short)", 8: "8.png: damaged picture (cut short)"}
    assert source.summary() == "2 of 50 records skipped, such as 7.png: damaged picture (cut short)"
    assert read_texts(source, [7, 9]) == [source[7].texts, source[9].texts]


def test_too_many_bad_records_stop_the_run():
    source = SkippingSource(_Source(100, set(range(40))), max_bad_fraction=0.03)
    with pytest.raises(
        RunError,
        match=r"pictures: too many records cannot be read, 4 so far, 3 allowed .*; the last: 3\.png: damaged picture",
    ):
        [source[index] for index in range(40)]
    strict = SkippingSource(_Source(100, {5}), max_bad=0)
    with pytest.raises(RunError, match="1 so far, 0 allowed"):
        strict[5]
    assert RunError.exit_code == 1


def test_all_bad_ends_too():
    with pytest.raises(RunError, match="found no readable record in place of number 1; 3 of 3 records skipped"):
        SkippingSource(_Source(3, {0, 1, 2}), max_bad=5)[1]


def test_check_reads_everything_and_stops_at_nothing():
    source = SkippingSource(_Source(30, {3, 20}), max_bad=0)
    assert set(source.check()) == {3, 20}
    assert set(SkippingSource(_Source(30, {3, 20}), max_bad=0).check(limit=10)) == {3}
    assert SkippingSource(_Source(5, set())).summary() == "no record was skipped"


def test_a_preview_shows_captions_and_questions_as_they_are():
    texts = (TextItem("yes", "Is it red?", "color"), TextItem("a red circle"))
    source = [ImageTextRecord("7", np.zeros((2, 3, 3), dtype=np.uint8), texts)]
    lines = ["first picture 7: 3 x 2 px", "  color: Is it red? -> 'yes'", "  caption: 'a red circle'"]
    assert preview(source) == lines
    assert preview(source, captions_only=True) == [lines[0], lines[2]]


def test_one_record_is_not_records():
    source = SkippingSource(_Source(1, {0}))
    source.check()
    assert source.summary() == "1 of 1 record skipped, such as 0.png: damaged picture (cut short)"


def test_real_files_of_every_bad_kind(tmp_path, caplog):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3)).astype(np.uint8)
    names = [f"{number}.png" for number in range(20)]
    for name in names:
        Image.fromarray(pixels).save(tmp_path / name)
    (tmp_path / "3.png").write_text("not a picture")
    (tmp_path / "5.png").write_bytes((tmp_path / "4.png").read_bytes()[:500])
    (tmp_path / "7.png").unlink()
    Image.new("1", (300, 300)).save(tmp_path / "9.png")
    table = tmp_path / "data.jsonl"
    table.write_text("".join(json.dumps({"image": name, "text": name}) + "\n" for name in names))
    spec = DataConfig(kind="files", path=str(table), eval_fraction=0.0, max_bad=4, max_pixels=50_000)
    source = open_image_text(spec)
    texts = [source[index].texts[0].text for index in range(20)]
    assert [text for index, text in enumerate(texts) if text != names[index]] == [texts[i] for i in (3, 5, 7, 9)]
    assert {"3.png", "5.png", "7.png", "9.png"}.isdisjoint(texts)
    told = " ".join(record.getMessage() for record in caplog.records)
    for reason in ("3.png: not a picture", "5.png: damaged picture", "7.png: no such file", "9.png: picture too large"):
        assert reason in told
    strict = open_image_text(DataConfig(kind="files", path=str(table), eval_fraction=0.0, max_pixels=50_000))
    with pytest.raises(RunError, match="too many records cannot be read, 2 so far, 1 allowed"):
        [strict[index] for index in range(20)]
