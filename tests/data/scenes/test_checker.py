"""The checker is right on true pictures and at chance on shuffled captions."""

from __future__ import annotations

import numpy as np
import pytest

from mmattn.data.scenes import SceneDataset
from mmattn.data.scenes.checker import check_caption, parse_caption, read_objects


def _captions(data: SceneDataset) -> list[str]:
    return [items[0].text for items in data.texts(range(len(data)))]


@pytest.mark.parametrize(("split", "image_size", "size"), [("test", 32, 250), ("heldout", 32, 250), ("test", 61, 40)])
def test_true_pictures_are_read_right(split, image_size, size):
    data = SceneDataset(split, size, seed=11, image_size=image_size, max_objects=3)
    verdicts = [
        check_caption(image, caption) for image, caption in zip(data.images(range(size)), _captions(data), strict=True)
    ]
    assert sum(verdict.is_right for verdict in verdicts) >= 0.995 * size


def test_shuffled_captions_are_at_chance():
    data = SceneDataset("test", 240, seed=12)
    captions = _captions(data)
    images = data.images(range(240))
    shuffled = [captions[index] for index in np.random.default_rng(0).permutation(240)]
    verdicts = [check_caption(image, caption) for image, caption in zip(images, shuffled, strict=True)]
    assert np.mean([verdict.is_right for verdict in verdicts]) < 0.02
    assert np.mean([verdict.colors for verdict in verdicts]) < 0.15
    assert np.mean([verdict.shapes for verdict in verdicts]) < 0.05


def test_a_wrong_word_is_found_and_named():
    data = SceneDataset("test", 60, seed=13)
    index, caption = next((i, text) for i, text in enumerate(_captions(data)) if "left of" in text and "large" in text)
    image = data.images([index])[0]
    assert check_caption(image, caption).is_right
    turned = check_caption(image, caption.replace("left of", "right of"))
    assert (turned.colors, turned.shapes, turned.sizes, turned.relations) == (True, True, True, False)
    resized = check_caption(image, caption.replace("large", "small", 1))
    assert (resized.colors, resized.shapes, resized.sizes) == (True, True, False)


def test_an_empty_or_noisy_picture_holds_no_objects():
    assert read_objects(np.full((32, 32, 3), 127, dtype=np.uint8)) == ()
    noise = np.random.default_rng(0).integers(110, 150, (32, 32, 3)).astype(np.uint8)
    assert read_objects(noise) == ()
    assert read_objects(np.full((32, 32, 3), (220, 30, 40), dtype=np.uint8)) == ()


def test_captions_are_parsed():
    claim = parse_caption("a large blue square left of a small red circle and above a small yellow ring")
    assert claim is not None
    assert claim.objects == (("large", "blue", "square"), ("small", "red", "circle"), ("small", "yellow", "ring"))
    assert claim.relations == ("left of", "above")
    assert parse_caption("a dog") is None
    with pytest.raises(ValueError, match="not a canonical caption: 'a dog'"):
        check_caption(np.zeros((32, 32, 3), dtype=np.uint8), "a dog")
