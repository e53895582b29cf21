"""The stamps reader, on a small package made here; on the real one where it is installed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmattn.data.readers import open_image_text
from mmattn.data.spec import DataConfig
from mmattn.data.stamps import INSTALLED, QUESTION, StampsSource, find_stamps, list_stamps, split_stamps
from mmattn.errors import DataError, UsageError

FAMILIES = {
    "animals/mammals/deer": 4,
    "animals/mammals/deer/cartoon": 2,
    "animals/birds": 5,
    "animals/fish": 4,
    "animals/insects": 3,
    "plants/flowers": 6,
    "plants/trees": 2,
    "plants/mushrooms": 2,
    "naturalforces": 2,
    "symbols/math": 3,
}


@pytest.fixture(scope="module")
def package(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("package")
    for family, count in FAMILIES.items():
        folder = root / "usr/share/tuxpaint/stamps" / family
        folder.mkdir(parents=True)
        for number in range(count):
            picture = Image.new("RGBA", (20, 10), (0, 0, 0, 0))
            picture.paste((200, 10 * number, 0, 255), (3, 2, 15, 9))
            picture.save(folder / f"s{number}.png")
            name = family.removesuffix("/cartoon").replace("/", " ")
            (folder / f"s{number}.txt").write_text(f"A {name} {number}.\nde.utf8=Ein Ding.\n")
    Image.new("RGBA", (4, 4)).save(root / "usr/share/tuxpaint/stamps/animals/birds/s0_mirror.png")
    (root / "usr/share/tuxpaint/stamps/plants/trees/s1.txt").write_text("A animals birds 1.\n")
    return root


def test_pictures_are_cut_out_and_pasted_on_white(package):
    source = StampsSource(package, "train")
    record = source[0]
    assert record.image.shape == (7, 12, 3)
    assert record.image[0, 0, 0] == 200
    assert source.name == "stamps/train"
    assert record.id.endswith(".png")


def test_captions_and_categories(package):
    stamps = list_stamps(find_stamps(package))
    assert len(stamps) == sum(FAMILIES.values()) - FAMILIES["symbols/math"]
    assert {stamp.category for stamp in stamps} == {"animals", "plants", "natural forces"}
    assert "animals/mammals/deer/cartoon" not in {stamp.family for stamp in stamps}
    caption, answer = StampsSource(package, "train").texts([0])[0]
    assert (caption.question, caption.kind) == (None, "caption")
    assert caption.text.startswith("A ")
    assert (answer.question, answer.kind) == (QUESTION, "category")


def test_families_and_captions_lie_in_one_split(package):
    stamps = list_stamps(find_stamps(package))
    for seed in range(5):
        parts = split_stamps(stamps, seed)
        assert sum(len(part) for part in parts.values()) == len(stamps)
        assert parts["test"]
        for first, second in (("train", "test"), ("train", "validation"), ("validation", "test")):
            for key in (lambda stamp: stamp.family, lambda stamp: stamp.caption):
                assert {key(stamp) for stamp in parts[first]}.isdisjoint(key(stamp) for stamp in parts[second])
        trained = {stamp.category for stamp in parts["train"]}
        assert {stamp.category for stamp in parts["test"]} <= trained
        assert split_stamps(list(reversed(stamps)), seed) == parts


def test_opened_by_config(package):
    source = open_image_text(DataConfig(kind="stamps", path=str(package), limit=3))
    assert len(source) == 3
    assert open_image_text(DataConfig(kind="stamps", path=str(package / "usr/share/tuxpaint/stamps")), "test")[0].texts


def test_missing_stamps_say_how_to_get_them(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="holds no stamps: install it .*apt-get download tuxpaint-stamps-default"):
        StampsSource(tmp_path)
    monkeypatch.setattr("mmattn.data.stamps.INSTALLED", tmp_path / "none")
    with pytest.raises(DataError, match="the package tuxpaint-stamps-default is not installed: .*set data.path=stamps"):
        StampsSource()
    with pytest.raises(UsageError, match="unknown stamps split 'heldout': use one of train, validation, test"):
        StampsSource(tmp_path, "heldout")


@pytest.mark.skipif(not INSTALLED.is_dir(), reason="the package tuxpaint-stamps-default is not installed")
def test_the_installed_package():
    parts = {split: StampsSource(split=split) for split in ("train", "validation", "test")}
    assert len(parts["train"]) > 300
    assert len(parts["test"]) > 50
    assert np.asarray(parts["test"][0].image).ndim == 3
