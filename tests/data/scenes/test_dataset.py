"""Scene pictures: what is drawn is where the regions say, at any size, however it is asked for."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from mmattn.data.records import BatchedSource, ImageTextSource, TextSource, read_records
from mmattn.data.scenes import SceneDataset
from mmattn.errors import UsageError


def test_is_a_source_whose_records_come_alike_one_by_one_and_in_batches():
    data = SceneDataset("train", 97, seed=3, max_objects=3)
    assert isinstance(data, ImageTextSource)
    assert isinstance(data, BatchedSource)
    assert isinstance(data, TextSource)
    batch = read_records(data, [5, 96, 5])
    for index, record in zip([5, 96, 5], batch, strict=True):
        alone = data[index]
        assert record.id == alone.id == f"scenes/train/{index}"
        assert np.array_equal(record.image, alone.image)
        assert record.texts == alone.texts == data.texts([index])[0]
    assert np.array_equal(data.images([5])[0], batch[0].image)
    assert batch[0].image.dtype == np.uint8
    assert batch[0].image.shape == (32, 32, 3)
    assert pickle.loads(pickle.dumps(data))[7].texts == data[7].texts


def test_iterating_ends_and_wrong_indices_are_refused():
    data = SceneDataset("test", 3)
    assert len(list(data)) == len(data) == 3
    with pytest.raises(IndexError, match="has 3 pictures, no number 3"):
        data[3]


@pytest.mark.parametrize("image_size", [32, 47, 256])
def test_regions_are_the_pixels_of_the_objects(image_size):
    data = SceneDataset("test", 23, seed=1, image_size=image_size, max_objects=3)
    for index in range(23):
        (scene,) = data.scenes([index])
        image = data.images([index])[0].astype(float)
        words = data.texts([index])[0][0].text.split()
        regions = data.regions(index)
        assert len(regions) == len(scene.objects)
        assert sum(region.mask.astype(int) for region in regions).max() == 1
        for item, region in zip(scene.objects, regions, strict=True):
            assert region.words == (item.size, item.color, item.shape)
            assert tuple(words[region.start : region.start + 3]) == region.words
            assert region.mask.shape == (image_size, image_size)
            inside = image[region.mask]
            assert np.abs(inside - np.clip(item.rgb, 0, 255)).max(axis=-1).min() < 2
            assert np.abs(inside - np.clip(item.rgb, 0, 255)).max() < 140
            columns = np.flatnonzero(region.mask.any(axis=0))
            assert abs((columns.min() + columns.max() + 1) / 2 / image_size - item.x) < 1.1 / image_size
            assert (columns.max() - columns.min() + 1) / image_size == pytest.approx(2 * item.radius, abs=0.09)
        outside = ~np.logical_or.reduce([region.mask for region in regions])
        assert (image.max(axis=-1) - image.min(axis=-1))[outside].mean() < 40


def test_size_changes_only_the_pixels():
    small, large = SceneDataset("test", 11, image_size=32), SceneDataset("test", 11, image_size=96)
    assert small.scenes(range(11)) == large.scenes(range(11))
    shrunk = large.images(range(11)).reshape(11, 32, 3, 32, 3, 3).mean(axis=(2, 4))
    assert np.abs(shrunk - small.images(range(11))).mean() < 6


def test_backgrounds_vary_but_are_never_as_colourful_as_objects():
    images = SceneDataset("train", 200).images(range(200)).astype(float)
    corners = images[:, :2, :2].mean(axis=(1, 2))
    assert corners.mean(axis=-1).std() > 25
    for index in range(200):
        region = np.logical_or.reduce([one.mask for one in SceneDataset("train", 200).regions(index)])
        away = (
            ~region
            & ~np.roll(region, 1, 0)
            & ~np.roll(region, -1, 0)
            & ~np.roll(region, 1, 1)
            & ~np.roll(region, -1, 1)
        )
        chroma = images[index].max(axis=-1) - images[index].min(axis=-1)
        assert np.quantile(chroma[away], 0.95) < 60


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_size": 16}, "image_size 16 is too small to tell shapes apart: use 24 or more"),
        ({"size": 0}, "a scenes data set needs a size of 1 or more, not 0"),
        ({"split": "dev"}, "unknown scenes split 'dev': use one of train, validation, test, heldout"),
        ({"max_objects": 0}, "max_objects must be 1, 2 or 3, not 0"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(UsageError, match=message):
        SceneDataset(**arguments)
