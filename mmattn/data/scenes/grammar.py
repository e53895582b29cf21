"""Scenes in words: the canonical caption, in English and in German.

The caption is a function of the scene, so that exact match can be scored:
"a small red circle", "a large blue square left of a small red circle",
"a large blue square left of a small red circle and above a small yellow ring".
Many more sentences, made for translation, are in `translation`.
"""

from __future__ import annotations

from mmattn.data.scenes import german
from mmattn.data.scenes.layout import COLORS, RELATIONS, SHAPES, SIZES, Scene, SceneObject, relation_of

_GERMAN_RELATIONS = {"left of": "links von", "right of": "rechts von", "above": "über", "below": "unter"}


def english_phrase(item: SceneObject, *, is_definite: bool = False) -> str:
    """ "a small red circle" or "the small red circle"."""
    return f"{'the' if is_definite else 'a'} {item.size} {item.color} {item.shape}"


def german_phrase(item: SceneObject, case: str = "nominative", *, is_definite: bool = False) -> str:
    """ "ein kleiner roter Kreis", declined for the case (one of `german.CASES`)."""
    noun = german.NOUNS[item.shape]
    article, adjectives = ("der", "weak") if is_definite else ("ein", "mixed")
    stems = german.SIZES[item.size], german.COLORS[item.color]
    words = [german.determiner("ein", article, case, noun.gender, is_plural=False)]
    words += [german.adjective(stem, adjectives, case, noun.gender, is_plural=False) for stem in stems]
    return " ".join([*words, german.noun(noun, case, is_plural=False)])


def caption(scene: Scene) -> str:
    """The canonical English caption."""
    first, *others = scene.objects
    relations = " and ".join(f"{_relation(first, other)} {english_phrase(other)}" for other in others)
    return f"{english_phrase(first)} {relations}".strip()


def german_caption(scene: Scene) -> str:
    """The canonical German caption, which says what `caption` says."""
    first, *others = scene.objects
    relations = " und ".join(
        f"{_GERMAN_RELATIONS[_relation(first, other)]} {german_phrase(other, 'dative')}" for other in others
    )
    return f"{german_phrase(first)} {relations}".strip()


def _relation(first: SceneObject, second: SceneObject) -> str:
    relation = relation_of(first, second)
    if relation is None:
        raise AssertionError(f"no clear relation between {first} and {second}")
    return relation


def caption_words() -> tuple[str, ...]:
    """Every word that a canonical caption may hold, sorted."""
    words = {"a", "and", *SIZES, *COLORS, *SHAPES}
    for relation in RELATIONS:
        words.update(relation.split())
    return tuple(sorted(words))
