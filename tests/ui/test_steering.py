"""What visitors write to steer a picture."""

from __future__ import annotations

import numpy as np
import pytest

from mmattn.errors import UsageError

pytest.importorskip("gradio")

from mmattn.ui.steering import draw_regions, read_regions, read_weights, region_line


def test_weights_one_a_line():
    assert read_weights("red = 1.6\n\n  a blue square:0 \n") == {"red": 1.6, "a blue square": 0.0}
    assert read_weights("") == read_weights(None) == {}


def test_regions_one_a_line():
    found = read_regions("a red circle = 0, 0, .5, 1\nblue = 0.25 0.5 1 0.75")
    assert found == {"a red circle": (0, 0, 0.5, 1), "blue": (0.25, 0.5, 1, 0.75)}


@pytest.mark.parametrize(
    ("read", "text", "message"),
    [
        (read_weights, "red = 1\nblue", "weights, line 2, 'blue': write it as in red = 1.6"),
        (read_weights, "red = much", "weights, line 1, 'red = much': write a word, = and a number"),
        (read_weights, "red = 1 2", "line 1, 'red = 1 2': write a word"),
        (read_weights, "red = 1\nred = 2", "line 2, 'red = 2': 'red' is there already"),
        (read_regions, "red = 0, 0, 1", "regions, line 1, 'red = 0, 0, 1': write a phrase, = and left, top"),
        (read_regions, "= 0, 0, 1, 1", "write it as in a red circle = 0, 0, 0.5, 1"),
    ],
)
def test_what_cannot_be_read_is_told(read, text, message):
    with pytest.raises(UsageError) as told:
        read(text)
    assert message in str(told.value)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(("read", "what"), [(read_weights, "weights"), (read_regions, "regions")])
def test_too_much_is_refused(read, what):
    with pytest.raises(UsageError, match=f"^the field of {what} has 5001 letters; the page takes 5000 at most$"):
        read("=" * 5001)
    assert read(" " * 5000) == {}


def test_two_corners_in_any_order():
    line = region_line("red", (0.75, 0.5), (0.25, 1.0))
    assert read_regions(line) == {"red": (0.25, 0.5, 0.75, 1.0)}


def test_boxes_are_drawn_where_they_are():
    empty = np.asarray(draw_regions({}, (32, 64), None)).astype(int)
    assert empty.shape == (160, 320, 3)
    drawn = np.asarray(draw_regions({"x": (0.5, 0.0, 1.0, 1.0)}, (32, 64), None)).astype(int)
    changed = np.abs(drawn - empty).sum(-1) > 0
    assert changed[:, 160:].any()
    assert not changed[:, :160].any()
    corner = np.asarray(draw_regions({}, (32, 64), (0.25, 0.5))).astype(int)
    rows, columns = np.nonzero(np.abs(corner - empty).sum(-1))
    assert (rows.mean() - 80, columns.mean() - 80) == pytest.approx((0, 0), abs=1)
