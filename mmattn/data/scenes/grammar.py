"""Scenes in words: the canonical English caption, and many wordings in English and German that say the same.

The canonical caption is a function of the scene, so that exact match can be scored:
"a small red circle", "a large blue square left of a small red circle",
"a large blue square left of a small red circle and above a small yellow ring".
"""

from __future__ import annotations

from dataclasses import dataclass

from mmattn.data.scenes.layout import COLORS, OPPOSITE, RELATIONS, SHAPES, SIZES, Scene, SceneObject, relation_of


@dataclass(frozen=True)
class Translation:
    """The same thing said in English and in German."""

    english: str
    german: str


_GERMAN_COLORS = {
    "blue": "blau",
    "green": "grün",
    "orange": "orangefarben",
    "pink": "rosafarben",
    "purple": "violett",
    "red": "rot",
    "turquoise": "türkisfarben",
    "yellow": "gelb",
}
_GERMAN_SIZES = {"small": "klein", "large": "groß"}
# Nouns with their gender: masculine, feminine, neuter.
_GERMAN_SHAPES = {
    "circle": ("Kreis", "m"),
    "cross": ("Kreuz", "n"),
    "diamond": ("Raute", "f"),
    "ring": ("Ring", "m"),
    "square": ("Quadrat", "n"),
    "triangle": ("Dreieck", "n"),
}
_GERMAN_RELATIONS = {"left of": "links von", "right of": "rechts von", "above": "über", "below": "unter"}

# (article, adjective ending) by case and gender. Singular nouns here take no ending of their own in any of them.
_INDEFINITE = {
    "nominative": {"m": ("ein", "er"), "f": ("eine", "e"), "n": ("ein", "es")},
    "accusative": {"m": ("einen", "en"), "f": ("eine", "e"), "n": ("ein", "es")},
    "dative": {"m": ("einem", "en"), "f": ("einer", "en"), "n": ("einem", "en")},
}
_DEFINITE = {
    "nominative": {"m": ("der", "e"), "f": ("die", "e"), "n": ("das", "e")},
    "accusative": {"m": ("den", "en"), "f": ("die", "e"), "n": ("das", "e")},
    "dative": {"m": ("dem", "en"), "f": ("der", "en"), "n": ("dem", "en")},
}


def english_phrase(item: SceneObject, *, is_definite: bool = False) -> str:
    """ "a small red circle" or "the small red circle"."""
    return f"{'the' if is_definite else 'a'} {item.size} {item.color} {item.shape}"


def german_phrase(item: SceneObject, case: str = "nominative", *, is_definite: bool = False) -> str:
    """ "ein kleiner roter Kreis", declined for the case ("nominative", "accusative", "dative")."""
    noun, gender = _GERMAN_SHAPES[item.shape]
    article, ending = (_DEFINITE if is_definite else _INDEFINITE)[case][gender]
    return f"{article} {_GERMAN_SIZES[item.size]}{ending} {_GERMAN_COLORS[item.color]}{ending} {noun}"


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


def translations(scene: Scene) -> tuple[Translation, ...]:
    """Every wording of the scene, canonical first: both ways round, definite and indefinite, three German cases."""
    pairs = [Translation(caption(scene), german_caption(scene))]
    first, *others = scene.objects
    if not others:
        return (*pairs, *_wordings_of_one(first))
    for other in others:
        relation = _relation(first, other)
        pairs += _wordings_of_two(first, relation, other)
        pairs += _wordings_of_two(other, OPPOSITE[relation], first)
    if len(scene.objects) > 1:
        pairs.append(_list_of(scene.objects))
    return tuple(pairs)


def _relation(first: SceneObject, second: SceneObject) -> str:
    relation = relation_of(first, second)
    if relation is None:
        raise AssertionError(f"no clear relation between {first} and {second}")
    return relation


def _wordings_of_one(item: SceneObject) -> list[Translation]:
    indefinite, definite = english_phrase(item), english_phrase(item, is_definite=True)
    noun = _GERMAN_SHAPES[item.shape][0]
    _, gender = _GERMAN_SHAPES[item.shape]
    size, color = _GERMAN_SIZES[item.size], _GERMAN_COLORS[item.color]
    article = _DEFINITE["nominative"][gender][0]
    return [
        Translation(f"there is {indefinite}", f"es gibt {german_phrase(item, 'accusative')}"),
        Translation(f"the picture shows {indefinite}", f"das Bild zeigt {german_phrase(item, 'accusative')}"),
        Translation(f"a picture of {indefinite}", f"ein Bild von {german_phrase(item, 'dative')}"),
        Translation(f"I see {definite}", f"ich sehe {german_phrase(item, 'accusative', is_definite=True)}"),
        Translation(f"the {item.shape} is {item.size} and {item.color}", f"{article} {noun} ist {size} und {color}"),
    ]


def _wordings_of_two(first: SceneObject, relation: str, second: SceneObject) -> list[Translation]:
    german = _GERMAN_RELATIONS[relation]
    to_dative = f"{german} {german_phrase(second, 'dative')}"
    to_the_dative = f"{german} {german_phrase(second, 'dative', is_definite=True)}"
    a_first, the_first = english_phrase(first), english_phrase(first, is_definite=True)
    a_second, the_second = english_phrase(second), english_phrase(second, is_definite=True)
    return [
        Translation(f"{a_first} is {relation} {a_second}", f"{german_phrase(first)} ist {to_dative}"),
        Translation(
            f"{the_first} is {relation} {the_second}", f"{german_phrase(first, is_definite=True)} ist {to_the_dative}"
        ),
        Translation(
            f"{relation} {the_second} there is {a_first}",
            f"{to_the_dative} gibt es {german_phrase(first, 'accusative')}",
        ),
        Translation(
            f"the picture shows {a_first} {relation} {a_second}",
            f"das Bild zeigt {german_phrase(first, 'accusative')} {to_dative}",
        ),
        Translation(
            f"I see {the_first} {relation} {a_second}",
            f"ich sehe {german_phrase(first, 'accusative', is_definite=True)} {to_dative}",
        ),
    ]


def _list_of(objects: tuple[SceneObject, ...]) -> Translation:
    english = [english_phrase(item) for item in objects]
    german = [german_phrase(item, "accusative") for item in objects]
    return Translation(
        f"there are {', '.join(english[:-1])} and {english[-1]}", f"es gibt {', '.join(german[:-1])} und {german[-1]}"
    )


def caption_words() -> tuple[str, ...]:
    """Every word that a canonical caption may hold, sorted."""
    words = {"a", "and", *SIZES, *COLORS, *SHAPES}
    for relation in RELATIONS:
        words.update(relation.split())
    return tuple(sorted(words))
