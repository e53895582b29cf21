"""Grids of pictures, and pictures as files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmattn.errors import UsageError
from mmattn.inference.diffusion.picture_files import picture_paths, save_picture, slug
from mmattn.inference.diffusion.picture_grid import picture_grid


def colours(count: int, size: tuple[int, int] = (32, 24)) -> list[Image.Image]:
    return [Image.new("RGB", size, (40 * number, 90, 200 - 30 * number)) for number in range(count)]


def test_grid_shows_every_picture_and_caption():
    images = colours(5)
    labels = ["a red circle", "", "a very large blue square above a small green star", "x" * 60, "b"]
    grid = picture_grid(images, labels, columns=3)
    plain = picture_grid(images, columns=3)
    assert grid.width == plain.width == 3 * (32 * 4 + 8) + 8
    assert plain.height == 2 * (24 * 4 + 8) + 8
    assert grid.height > plain.height + 3 * 16  # lines of the longest caption of each row
    found = {tuple(colour) for colour in np.asarray(plain).reshape(-1, 3)}
    assert {image.getpixel((0, 0)) for image in images} <= found
    ink = np.asarray(grid.convert("L")) < 60
    assert ink.sum() > 200
    assert not ink[:, -8:].any()  # captions stay inside
    assert not ink[-4:].any()


def test_grid_enlarges_pixel_by_pixel():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (2, 3, 3), dtype=np.uint8))
    grid = np.asarray(picture_grid([image], scale=5))[8:18, 8:23]
    np.testing.assert_array_equal(grid, np.asarray(image).repeat(5, 0).repeat(5, 1))
    assert picture_grid(colours(1, (600, 400))).size == (616, 416)


def test_grid_refuses():
    for arguments, message in (
        (([],), "no pictures were given"),
        ((colours(2), ["a"]), "1 labels for 2 pictures: give one for each"),
    ):
        with pytest.raises(UsageError, match=message):
            picture_grid(*arguments)
    with pytest.raises(UsageError, match="columns is 0 and scale"):
        picture_grid(colours(1), columns=0)


def test_names():
    assert slug("A red circle, above!") == "a-red-circle-above"
    assert slug("Ein grüner Kreis") == "ein-grüner-kreis"
    assert slug("../..") == "picture"
    assert len(slug("word " * 50)) <= 60
    assert slug("x" * 200) == "x" * 60
    paths = picture_paths(Path("out"), ["a b", "a b", "a b", "c"], [0, 1, 0, 0])
    assert [path.name for path in paths] == ["a-b-seed0.png", "a-b-seed1.png", "a-b-seed0-2.png", "c-seed0.png"]
    assert picture_paths(Path("one.png"), ["a"], [3]) == [Path("one.png")]


def test_a_file_says_how_it_was_made(tmp_path):
    path = tmp_path / "new" / "a.png"
    save_picture(colours(1)[0], path, {"prompt": "ein grüner Kreis 圆", "seed": 3})
    assert Image.open(path).text == {"prompt": "ein grüner Kreis 圆", "seed": "3"}
    assert [each.name for each in path.parent.iterdir()] == ["a.png"]
