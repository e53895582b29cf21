"""Every answer is right, and no question gives its answer away."""

from __future__ import annotations

import re
from collections import Counter, defaultdict

import pytest

from mmattn.data.records import TextItem
from mmattn.data.scenes import HELD_OUT_PAIRS, SceneDataset
from mmattn.data.scenes.layout import Scene, SceneObject
from mmattn.data.scenes.questions import KINDS


def _find(scene: Scene, name: str) -> SceneObject:
    (item,) = [item for item in scene.objects if f"{item.color} {item.shape}" == name]
    return item


def _is_so(first: SceneObject, relation: str, second: SceneObject) -> bool:
    """Strictly, so that a "no" is a no even for those who take a slight offset for a relation."""
    return {
        "left of": first.x < second.x,
        "right of": first.x > second.x,
        "above": first.y < second.y,
        "below": first.y > second.y,
    }[relation]


def _answer(scene: Scene, item: TextItem) -> str:
    """The answer, worked out from the question's wording alone."""
    question = item.question or ""
    objects = scene.objects
    if question == "how many objects are there?":
        return ["zero", "one", "two", "three"][len(objects)]
    if match := re.fullmatch(r"what color is the (\w+)\?", question):
        (color,) = {one.color for one in objects if one.shape == match[1]}
        return color
    if match := re.fullmatch(r"what shape is (\w+)\?", question):
        (shape,) = {one.shape for one in objects if one.color == match[1]}
        return shape
    if match := re.fullmatch(r"what size is the (\w+ \w+)\?", question):
        return _find(scene, match[1]).size
    if match := re.fullmatch(r"is there an? (\w+) (\w+)\?", question):
        return "yes" if (match[1], match[2]) in {one.pair for one in objects} else "no"
    if match := re.fullmatch(r"where is the (\w+ \w+) relative to the (\w+ \w+)\?", question):
        first, second = _find(scene, match[1]), _find(scene, match[2])
        across, down = first.x - second.x, first.y - second.y
        if abs(across) > abs(down):
            return "left of" if across < 0 else "right of"
        return "above" if down < 0 else "below"
    match = re.fullmatch(r"is the (\w+ \w+) (left of|right of|above|below) the (\w+ \w+)\?", question)
    assert match, question
    return "yes" if _is_so(_find(scene, match[1]), match[2], _find(scene, match[3])) else "no"


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_answers_are_right(split):
    data = SceneDataset(split, 600, seed=2, max_objects=3)
    kinds = Counter()
    for scene, items in zip(data.scenes(range(600)), data.texts(range(600)), strict=True):
        assert items[0].kind == "caption"
        assert items[0].question is None
        for item in items[1:]:
            kinds[item.kind] += 1
            assert item.text == _answer(scene, item), (scene, item)
    assert set(kinds) == set(KINDS)


def test_questions_are_spelled_right():
    questions = {item.question for items in SceneDataset("train", 500).texts(range(500)) for item in items[1:]}
    assert "is there an orange circle?" in questions
    assert not any(" a orange" in str(question) for question in questions)


def test_yes_and_no_are_equally_frequent_on_every_picture():
    for items in SceneDataset("test", 300, max_objects=3).texts(range(300)):
        for kind in ("exists", "relation_check"):
            answers = [item.text for item in items if item.kind == kind]
            assert answers.count("yes") == answers.count("no")


@pytest.mark.parametrize("split", ["test", "heldout"])
def test_a_model_that_sees_no_picture_is_near_the_majority_answer(split):
    seen: dict[tuple[str, str], Counter] = defaultdict(Counter)
    by_kind: dict[str, Counter] = defaultdict(Counter)
    train = SceneDataset("train", 6000)
    for items in train.texts(range(len(train))):
        for item in items[1:]:
            seen[item.kind, item.question or ""][item.text] += 1
            by_kind[item.kind][item.text] += 1
    right, majority, total = Counter(), Counter(), Counter()
    data = SceneDataset(split, 1500)
    for items in data.texts(range(len(data))):
        for item in items[1:]:
            counts = seen[item.kind, item.question or ""] or by_kind[item.kind]
            total[item.kind] += 1
            right[item.kind] += counts.most_common(1)[0][0] == item.text
            majority[item.kind] += by_kind[item.kind].most_common(1)[0][0] == item.text
    for kind in KINDS:
        assert right[kind] / total[kind] < majority[kind] / total[kind] + 0.08, kind


def test_training_never_names_a_held_out_pair():
    texts = {
        text
        for items in SceneDataset("train", 1500, max_objects=3).texts(range(1500))
        for item in items
        for text in (item.text, item.question or "")
    }
    for color, shape in HELD_OUT_PAIRS:
        assert not any(f"{color} {shape}" in text for text in texts)


def test_held_out_pictures_ask_after_held_out_pairs():
    asked = Counter()
    for items in SceneDataset("heldout", 500).texts(range(500)):
        for item in items:
            if item.kind == "exists":
                match = re.search(r"(\w+) (\w+)\?", item.question or "")
                assert match
                asked[(match[1], match[2]) in HELD_OUT_PAIRS] += 1
    assert set(asked) == {True}
