"""Scores of maps against objects whose pixels are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mmattn import TextToImage, UNet
from mmattn.data.scenes import SceneDataset
from mmattn.errors import UsageError
from mmattn.inference.diffusion.pixel_pipeline import PixelPipeline
from mmattn.inference.diffusion.scene_maps import scene_maps
from mmattn.inference.map_scores import ScoredMap, best_spots, map_scores, overlap, points_at, scored_scenes
from tests.inference.tiny_pipelines import pixel_parts, stable_diffusion
from tests.swap.zoo_base import quiet


def square(row: int, column: int) -> np.ndarray:
    mask = np.zeros((24, 24), dtype=bool)
    mask[row : row + 8, column : column + 8] = True
    return mask


def spot_on(mask: np.ndarray) -> np.ndarray:
    return mask.reshape(3, 8, 3, 8).mean(axis=(1, 3))


def test_pointing_and_overlap_of_maps_that_are_known():
    mask = square(8, 16)
    assert points_at(spot_on(mask), mask)
    assert not points_at(spot_on(square(0, 0)), mask)
    assert overlap(mask.astype(float), mask) == 1.0
    assert overlap(np.flip(mask, axis=1).astype(float), mask) == 0.0
    assert overlap(np.full((3, 3), 0.25), mask) == 0.0, "an even map has no strong part"
    half = mask.copy()
    half[:, 20:] = False
    assert overlap(half.astype(float), mask) == 0.5


def test_the_best_heads_are_found_and_scored_beside_chance():
    draw = np.random.default_rng(0)
    masks = [square(8 * (number % 3), 8 * (number % 2)) for number in range(11)]
    objects = [
        ScoredMap(number, mask, {(0, 0): draw.random((3, 3)), (1, 2): spot_on(mask), (1, 3): draw.random((6, 6))})
        for number, mask in enumerate(masks)
    ]
    spots, threshold = best_spots(objects)
    assert spots[0] == (1, 2)
    scores = map_scores(objects, spots, threshold)
    assert scores["maps/pointing"] == 1.0
    assert scores["maps/iou"] > 0.5
    assert scores["maps/iou/chance"] < scores["maps/iou"]
    assert set(scores) == {"maps/pointing", "maps/iou", "maps/pointing/chance", "maps/iou/chance"}
    mixed = map_scores(objects, [(1, 2), (1, 3)])
    assert 0 < mixed["maps/iou"] < 1


def test_chance_is_another_pictures_objects():
    """Also of few pictures with several objects each, and of one object in the middle of a list."""
    for pictures in ([0, 0, 1], [0, 1, 1, 1], [0, 0, 0, 1, 1, 2]):
        masks = {0: square(0, 0), 1: square(8, 8), 2: square(16, 16)}
        objects = [ScoredMap(number, masks[number], {(0, 0): spot_on(masks[number])}) for number in pictures]
        scores = map_scores(objects, [(0, 0)])
        assert scores["maps/pointing"] == 1.0
        assert scores["maps/pointing/chance"] == 0.0
        assert scores["maps/iou/chance"] == 0.0
    with pytest.raises(UsageError, match="no chance level: the model named objects of one picture only"):
        map_scores(objects[:3], [(0, 0)])


def test_nothing_to_score():
    with pytest.raises(UsageError, match="no map to score"):
        map_scores([], [(0, 0)])
    with pytest.raises(UsageError, match="no map to choose layers by"):
        scored_scenes(lambda numbers: [], 4, 2)


def test_scenes_are_noised_and_read_for_every_object():
    pipeline = quiet(PixelPipeline(**pixel_parts(sample_size=12)))
    pipeline.unet = UNet.from_stock(pipeline.unet)
    # A vocabulary of its own words only: unknown ones would all be the same token.
    source = _WordsKnown(SceneDataset("test", size=5, image_size=24))
    objects = scene_maps(TextToImage(pipeline), source, range(3))
    assert len(objects) == sum(len(source.regions(number)) for number in range(3))
    assert all(each.mask.shape == (24, 24) for each in objects)
    assert {spot.word for each in objects for spot in each.maps} == {0, 1, 2}
    shapes = {values.shape for each in objects for values in each.maps.values()}
    assert shapes == {(6, 6)}
    again = scene_maps(TextToImage(pipeline), source, range(3))
    assert all(np.array_equal(one.maps[0, 0, 1], two.maps[0, 0, 1]) for one, two in zip(objects, again, strict=True))
    assert torch.is_grad_enabled()
    with pytest.raises(UsageError, match="scenes, which are pixels: StableDiffusionPipeline draws latents"):
        scene_maps(TextToImage(stable_diffusion()), source, range(1))


class _WordsKnown:
    """Scenes of which every caption is about circles and squares, the words of the tiny tokenizer."""

    def __init__(self, source: SceneDataset) -> None:
        self.source = source
        self.images = source.images

    def texts(self, numbers):
        from mmattn.data.records import TextItem

        return [(TextItem(" ".join(["a red circle"] * len(self.source.regions(number)))),) for number in numbers]

    def regions(self, number):
        from mmattn.data.scenes.dataset import ObjectRegion

        return tuple(
            ObjectRegion(("a", "red", "circle"), 3 * place, region.mask)
            for place, region in enumerate(self.source.regions(number))
        )
