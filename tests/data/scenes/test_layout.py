"""What scenes show: deterministic, held-out pairs kept apart, directions that only the picture tells."""

from __future__ import annotations

from collections import Counter

import pytest

from mmattn.data.scenes.layout import (
    ALL_PAIRS,
    COLORS,
    GAP,
    HELD_OUT_PAIRS,
    RELATIONS,
    SHAPES,
    TRAINED_PAIRS,
    draw_scenes,
    relation_of,
)
from mmattn.errors import UsageError


@pytest.mark.parametrize("max_objects", [1, 2, 3])
def test_a_scene_depends_on_its_index_alone(max_objects):
    scenes = draw_scenes(5, "train", range(50), max_objects)
    assert draw_scenes(5, "train", [31, 7], max_objects) == [scenes[31], scenes[7]]
    assert draw_scenes(6, "train", [7], max_objects) != [scenes[7]]
    assert draw_scenes(5, "test", [7], max_objects) != [scenes[7]]


def test_a_fifth_of_the_pairs_is_held_out_and_every_colour_and_shape_keeps_partners():
    assert 0.19 < len(HELD_OUT_PAIRS) / len(ALL_PAIRS) < 0.22
    assert set(COLORS) == {color for color, _ in HELD_OUT_PAIRS}
    assert set(SHAPES) == {shape for _, shape in HELD_OUT_PAIRS}
    assert min(Counter(color for color, _ in TRAINED_PAIRS).values()) >= 4
    assert min(Counter(shape for _, shape in TRAINED_PAIRS).values()) >= 6


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_no_picture_of_a_trained_split_shows_a_held_out_pair(split):
    scenes = draw_scenes(0, split, range(3000), 3)
    shown = Counter(item.pair for scene in scenes for item in scene.objects)
    assert set(shown) == set(TRAINED_PAIRS)
    assert max(shown.values()) < 1.5 * min(shown.values())


def test_every_held_out_picture_shows_one_held_out_pair():
    scenes = draw_scenes(0, "heldout", range(500), 3)
    assert {sum(item.pair in HELD_OUT_PAIRS for item in scene.objects) for scene in scenes} == {1}
    assert {item.pair for scene in scenes for item in scene.objects if item.pair in HELD_OUT_PAIRS} == HELD_OUT_PAIRS


def test_pictures_of_a_test_are_not_those_of_training():
    train = {scene.objects for scene in draw_scenes(0, "train", range(2000), 2)}
    assert train.isdisjoint(scene.objects for scene in draw_scenes(0, "test", range(500), 2))


@pytest.mark.parametrize("max_objects", [2, 3])
def test_objects_stand_apart_and_the_first_has_clear_relations(max_objects):
    for scene in draw_scenes(1, "train", range(1000), max_objects):
        for item in scene.objects:
            assert item.radius <= min(item.x, item.y)
            assert max(item.x, item.y) + item.radius <= 1
        for position, first in enumerate(scene.objects):
            for second in scene.objects[position + 1 :]:
                distance = max(abs(first.x - second.x), abs(first.y - second.y))
                assert distance >= first.radius + second.radius + GAP
        assert all(relation_of(scene.objects[0], other) is not None for other in scene.objects[1:])


def test_objects_are_ordered_by_what_they_are():
    for scene in draw_scenes(1, "train", range(500), 3):
        pairs = [item.pair for item in scene.objects]
        assert pairs == sorted(set(pairs))


def test_what_the_objects_are_does_not_give_the_direction_away():
    scenes = [scene for scene in draw_scenes(2, "train", range(8000), 2) if len(scene.objects) == 2]
    assert 0.55 < len(scenes) / 8000 < 0.65
    for key in (lambda item: item.color, lambda item: item.shape, lambda item: item.size):
        counts: dict[str, Counter] = {}
        for scene in scenes:
            relation = relation_of(*scene.objects)
            counts.setdefault(key(scene.objects[0]), Counter())[relation] += 1
        for value, relations in counts.items():
            if (total := sum(relations.values())) > 500:
                shares = [relations[relation] / total for relation in RELATIONS]
                assert max(shares) < 0.33, (value, relations)


def test_wrong_split_and_count_are_refused():
    with pytest.raises(UsageError, match="unknown scenes split 'val': use one of train, validation, test, heldout"):
        draw_scenes(0, "val", [0], 2)
    with pytest.raises(UsageError, match="max_objects must be 1, 2 or 3, not 4"):
        draw_scenes(0, "train", [0], 4)
