"""Aspect buckets: which there are, who is in which, and how sizes are found without decoding."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from mmattn.data import tables
from mmattn.data.buckets import assign_buckets, bucket_sizes, header_size, nearest_size, picture_sizes, usable_source
from mmattn.data.picture_fit import PictureConfig
from mmattn.data.readers import open_image_text
from mmattn.data.scenes import SceneDataset
from mmattn.data.spec import DataConfig
from mmattn.errors import DataError, RunError


def write_pictures(folder, sizes, texts=None):
    """Pictures of these (width, height) and their table."""
    rows = []
    for number, (width, height) in enumerate(sizes):
        Image.new("RGB", (width, height), (number, 50, 90)).save(folder / f"{number}.png")
        rows.append({"image": f"{number}.png", "text": texts[number] if texts else f"picture {number}"})
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataConfig(kind="files", path=str(folder / "data.jsonl"), eval_fraction=0.0, max_bad=2)


@pytest.mark.parametrize(("resolution", "step", "aspect"), [(512, 64, 2.0), (1024, 64, 4.0), (96, 8, 3.0), (64, 64, 2)])
def test_buckets_keep_area_step_and_aspect(resolution, step, aspect):
    sizes = bucket_sizes(PictureConfig(resolution=resolution, buckets=True, step=step, max_aspect=aspect))
    assert (resolution, resolution) in sizes
    assert len(set(sizes)) == len(sizes)
    for height, width in sizes:
        assert height % step == width % step == 0
        assert 0.6 * resolution**2 <= height * width <= resolution**2 or resolution == step
        assert max(height, width) <= aspect * min(height, width)
        assert (width, height) in sizes
    assert sizes == sorted(sizes, key=lambda size: size[0] / size[1])


def test_known_buckets():
    wide = [size for size in bucket_sizes(PictureConfig(resolution=512, buckets=True)) if size[1] >= size[0]]
    assert {(384, 640), (448, 576), (512, 512)} <= set(wide)
    assert bucket_sizes(PictureConfig(resolution=31)) == [(31, 31)]


def test_a_picture_goes_where_its_shape_is():
    sizes = bucket_sizes(PictureConfig(resolution=512, buckets=True))
    for original, expected in (((100, 100), (512, 512)), ((1000, 1290), (448, 576)), ((1290, 1000), (576, 448))):
        assert sizes[nearest_size(original, sizes)] == expected
    widest = sizes[nearest_size((10, 1000), sizes)]
    assert widest[1] / widest[0] == max(width / height for height, width in sizes)
    assert [(2, 2), (4, 4), (3, 3)][nearest_size((7, 7), [(2, 2), (4, 4), (3, 3)])] == (4, 4)


def test_scarce_buckets_give_their_pictures_to_the_nearest():
    config = PictureConfig(resolution=512, buckets=True)
    originals = np.array([(512, 512)] * 9 + [(448, 576)] * 7 + [(384, 640)] * 2 + [(640, 384)])
    every = assign_buckets(originals, config)
    assert sorted(every.sizes) == [(384, 640), (448, 576), (512, 512), (640, 384)]
    assert np.array_equal(every.example_sizes, originals)
    few = assign_buckets(originals, config, min_examples=3)
    assert sorted(few.sizes) == [(448, 576), (512, 512)]
    assert few.example_sizes[-3:].tolist() == [[448, 576], [448, 576], [512, 512]]
    assert few.describe() == "2 buckets (576 x 448: 9, 512 x 512: 10)"
    alone = assign_buckets(originals, config, min_examples=100)
    assert alone.describe() == "1 bucket (512 x 512: 19)"
    assert alone.groups.tolist() == [0] * 19
    with pytest.raises(DataError, match="no pictures to put into buckets"):
        assign_buckets(originals[:0], config)


def test_sizes_come_from_headers(tmp_path, monkeypatch):
    sizes = [(101, 67), (67, 101), (71, 73)]
    source = open_image_text(write_pictures(tmp_path, sizes))
    config = PictureConfig(resolution=64, buckets=True, step=16)
    monkeypatch.setattr(tables, "open_image", None)  # nothing is decoded
    assert picture_sizes(usable_source(source, config), config).tolist() == [[h, w] for w, h in sizes]
    assert picture_sizes(SceneDataset("train", 5), config).tolist() == [[32, 32]] * 5


def test_a_turned_picture_has_the_size_that_it_is_shown_in(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (101, 67)).save(tmp_path / "turned.jpg", exif=exif)
    assert header_size(tmp_path / "turned.jpg") == (101, 67)
    assert header_size((tmp_path / "turned.jpg").read_bytes()) == (101, 67)


def test_unusable_pictures_are_named_counted_and_replaced(tmp_path, caplog):
    spec = write_pictures(tmp_path, [(101, 67), (20, 20), (67, 101), (90, 90)])
    (tmp_path / "3.png").write_bytes(b"nothing")
    config = PictureConfig(resolution=64, buckets=True, step=16)
    source = usable_source(open_image_text(spec), config)
    sizes = picture_sizes(source, config).tolist()
    assert (sizes[0], sizes[2]) == ([67, 101], [101, 67])
    assert {tuple(sizes[1]), tuple(sizes[3])} <= {(67, 101), (101, 67)}
    assert source[1].image.shape[:2] == tuple(sizes[1])
    told = " ".join(record.getMessage() for record in caplog.records)
    assert "1.png: picture too small (20 x 20 pixels): it would have to be enlarged 3.2 times to 64 x 64, and" in told
    assert "3.png: not a picture" in told
    spec.max_bad = 1
    strict = usable_source(open_image_text(spec), config)
    with pytest.raises(RunError, match="too many records cannot be read, 2 so far, 1 allowed"):
        picture_sizes(strict, config)
