"""Captions are functions of the scene; German genders, cases and endings are right."""

from __future__ import annotations

import pytest

from mmattn.data.scenes import grammar
from mmattn.data.scenes.layout import COLORS, OPPOSITE, SHAPES, Scene, SceneObject, draw_scenes


def _item(size: str, color: str, shape: str, x: float = 0.5, y: float = 0.5) -> SceneObject:
    return SceneObject(color, shape, size, x, y, 0.12, (0.0, 0.0, 0.0))


def _scene(*objects: SceneObject) -> Scene:
    return Scene(objects, (0.5,) * 12)


BLUE_SQUARE = _item("large", "blue", "square", 0.2, 0.3)
RED_CIRCLE = _item("small", "red", "circle", 0.8, 0.4)
YELLOW_DIAMOND = _item("small", "yellow", "diamond", 0.25, 0.8)


def test_canonical_captions():
    assert grammar.caption(_scene(RED_CIRCLE)) == "a small red circle"
    assert grammar.caption(_scene(BLUE_SQUARE, RED_CIRCLE)) == "a large blue square left of a small red circle"
    assert (
        grammar.caption(_scene(BLUE_SQUARE, RED_CIRCLE, YELLOW_DIAMOND))
        == "a large blue square left of a small red circle and above a small yellow diamond"
    )
    assert (
        grammar.german_caption(_scene(BLUE_SQUARE, RED_CIRCLE, YELLOW_DIAMOND))
        == "ein großes blaues Quadrat links von einem kleinen roten Kreis und über einer kleinen gelben Raute"
    )


def test_caption_tells_scenes_apart_that_differ_in_what_they_show():
    seen: dict[str, tuple] = {}
    for scene in draw_scenes(0, "train", range(3000), 3):
        first = scene.objects[0]
        relations = [grammar.relation_of(first, other) for other in scene.objects[1:]]
        facts = (tuple((item.size, item.color, item.shape) for item in scene.objects), tuple(relations))
        assert seen.setdefault(grammar.caption(scene), facts) == facts
    assert len(seen) > 1500


@pytest.mark.parametrize(
    ("shape", "case", "is_definite", "expected"),
    [
        ("circle", "nominative", False, "ein kleiner roter Kreis"),
        ("circle", "accusative", False, "einen kleinen roten Kreis"),
        ("circle", "dative", False, "einem kleinen roten Kreis"),
        ("circle", "nominative", True, "der kleine rote Kreis"),
        ("circle", "accusative", True, "den kleinen roten Kreis"),
        ("ring", "dative", True, "dem kleinen roten Ring"),
        ("diamond", "nominative", False, "eine kleine rote Raute"),
        ("diamond", "accusative", False, "eine kleine rote Raute"),
        ("diamond", "dative", False, "einer kleinen roten Raute"),
        ("diamond", "nominative", True, "die kleine rote Raute"),
        ("diamond", "accusative", True, "die kleine rote Raute"),
        ("diamond", "dative", True, "der kleinen roten Raute"),
        ("cross", "nominative", False, "ein kleines rotes Kreuz"),
        ("square", "accusative", False, "ein kleines rotes Quadrat"),
        ("triangle", "dative", False, "einem kleinen roten Dreieck"),
        ("triangle", "nominative", True, "das kleine rote Dreieck"),
        ("triangle", "accusative", True, "das kleine rote Dreieck"),
    ],
)
def test_german_declension(shape, case, is_definite, expected):
    assert grammar.german_phrase(_item("small", "red", shape), case, is_definite=is_definite) == expected


def test_every_colour_and_shape_has_a_german_word():
    words = {grammar.german_phrase(_item("large", color, shape)) for color in COLORS for shape in SHAPES}
    assert len(words) == len(COLORS) * len(SHAPES)
    assert "eine große türkisfarbene Raute" in words


def test_caption_words_cover_the_captions():
    words = set(grammar.caption_words())
    for scene in draw_scenes(0, "heldout", range(200), 3):
        assert set(grammar.caption(scene).split()) <= words
    assert set(OPPOSITE) == set(OPPOSITE.values())
