"""How maps are drawn."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from mmattn.maps.draw import Heatmap, load_font


def test_the_map_without_the_picture_beside_it():
    values = np.arange(6.0).reshape(2, 3)
    heatmap = Heatmap(values, Image.new("RGB", (600, 400), "white"), "cat", "a cat")
    both, alone = heatmap.draw(), heatmap.draw(beside=False)
    assert alone.height == both.height
    assert both.width - alone.width == 600 + 12
    # The same map, legend and words, nothing cut off.
    below = np.asarray(alone)[-450:, 12:612]
    assert (below[:400] == np.asarray(both)[-450:-50, -612:-12]).all()
    small = Heatmap(values, Image.new("RGB", (3, 2)), "cat", "a cat").draw(beside=False)
    assert small.width >= 320


def test_letters_of_other_languages_are_there():
    pytest.importorskip("matplotlib")
    font = load_font(16)
    missing = np.asarray(font.getmask("\uffff")).tobytes()
    for letter in "ßäöüéçñłžαЖ":
        assert np.asarray(font.getmask(letter)).tobytes() != missing, letter
