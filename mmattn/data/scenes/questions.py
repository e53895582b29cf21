"""Questions on scenes with one right answer each, balanced so that a model without the picture learns little.

Yes and no questions come in pairs, as many of each on every picture. What is asked about in a "no" is drawn from the
same set as in a "yes": in training only colour and shape pairs that training shows, on held-out pictures only pairs
that it does not.
"""

from __future__ import annotations

from collections.abc import Sequence

from mmattn.data.records import TextItem
from mmattn.data.scenes.layout import HELD_OUT_PAIRS, OPPOSITE, TRAINED_PAIRS, Scene, SceneObject, relation_of

KINDS = ("color", "shape", "size", "count", "exists", "relation", "relation_check")
DRAWS = 7  # random numbers that `questions` uses
_NUMBERS = ("zero", "one", "two", "three")
_HELD_OUT_ORDERED = tuple(sorted(HELD_OUT_PAIRS))
_AXIS_WORDS = (("left of", "right of"), ("above", "below"))


def questions(scene: Scene, draws: Sequence[float]) -> tuple[TextItem, ...]:
    """All questions on a scene, with their answers.

    Args:
        scene: What to ask about.
        draws: `DRAWS` numbers in [0, 1) that choose among the possible questions.
    """
    objects = scene.objects
    items = [TextItem(_NUMBERS[len(objects)], "how many objects are there?", "count")]
    shapes = [item.shape for item in objects]
    colors = [item.color for item in objects]
    for item in objects:
        if shapes.count(item.shape) == 1:
            items.append(TextItem(item.color, f"what color is the {item.shape}?", "color"))
        if colors.count(item.color) == 1:
            items.append(TextItem(item.shape, f"what shape is {item.color}?", "shape"))
        items.append(TextItem(item.size, f"what size is the {item.color} {item.shape}?", "size"))
    items += _existence(scene, draws)
    if len(objects) > 1:
        items += _relations(objects, draws)
    return tuple(items)


def _existence(scene: Scene, draws: Sequence[float]) -> list[TextItem]:
    present = {item.pair for item in scene.objects}
    choices = _HELD_OUT_ORDERED if scene.has_held_out_pair else TRAINED_PAIRS
    shown = [pair for pair in choices if pair in present]
    yes = shown[int(draws[0] * len(shown))]
    absent = [pair for pair in choices if pair not in present]
    if draws[1] < 0.6:  # near misses: the colour of something in the picture, or its shape
        colors, shapes = {color for color, _ in present}, {shape for _, shape in present}
        absent = [pair for pair in absent if pair[0] in colors or pair[1] in shapes] or absent
    no = absent[int(draws[2] * len(absent))]
    return [
        TextItem(answer, f"is there {_article(color)} {color} {shape}?", "exists")
        for answer, (color, shape) in (("yes", yes), ("no", no))
    ]


def _relations(objects: Sequence[SceneObject], draws: Sequence[float]) -> list[TextItem]:
    clear = [
        (first, relation, second)
        for first in objects
        for second in objects
        if first is not second and (relation := relation_of(first, second)) is not None
    ]
    items = []
    first, relation, second = clear[int(draws[3] * len(clear))]
    question = f"where is the {_name(first)} relative to the {_name(second)}?"
    items.append(TextItem(relation, question, "relation"))
    first, relation, second = clear[int(draws[4] * len(clear))]
    # Both ways round, and each beside its contradiction: whoever does not tell the two objects and the two directions
    # apart is at chance here. Directions on the other axis are few, since they can be told without either.
    for one, said, other, draw in ((first, relation, second, draws[5]), (second, OPPOSITE[relation], first, draws[6])):
        wrong = _never_true(one, said, other) if draw < 0.2 else OPPOSITE[said]
        items.append(TextItem("yes", _check(one, said, other), "relation_check"))
        items.append(TextItem("no", _check(one, wrong, other), "relation_check"))
    return items


def _never_true(first: SceneObject, relation: str, second: SceneObject) -> str:
    """A relation on the other axis that is not even slightly so."""
    if relation in _AXIS_WORDS[0]:
        return "below" if first.y < second.y else "above"
    return "right of" if first.x < second.x else "left of"


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def _name(item: SceneObject) -> str:
    return f"{item.color} {item.shape}"


def _check(first: SceneObject, relation: str, second: SceneObject) -> str:
    return f"is the {_name(first)} {relation} the {_name(second)}?"
