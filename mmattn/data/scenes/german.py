"""German words for scenes and how they are declined: genders, numbers, four cases, three adjective declensions.

After Duden, Die Grammatik: adjectives are weak after a determiner that shows the case by its own ending (der, dieser,
jeder, alle), mixed after ein, kein and the possessives, strong without a determiner and after numerals.
"""

from __future__ import annotations

from dataclasses import dataclass

CASES = ("nominative", "accusative", "dative", "genitive")


@dataclass(frozen=True)
class Noun:
    """A noun with its gender ("m", "f", "n") and forms.

    Args:
        singular: Nominative, and every other case but the genitive.
        gender: "m", "f" or "n".
        genitive: Genitive singular.
        plural: Nominative plural, and every other case but the dative.
        dative_plural: Dative plural.
    """

    singular: str
    gender: str
    genitive: str
    plural: str
    dative_plural: str


NOUNS = {
    "circle": Noun("Kreis", "m", "Kreises", "Kreise", "Kreisen"),
    "cross": Noun("Kreuz", "n", "Kreuzes", "Kreuze", "Kreuzen"),
    "diamond": Noun("Raute", "f", "Raute", "Rauten", "Rauten"),
    "ring": Noun("Ring", "m", "Rings", "Ringe", "Ringen"),
    "square": Noun("Quadrat", "n", "Quadrats", "Quadrate", "Quadraten"),
    "triangle": Noun("Dreieck", "n", "Dreiecks", "Dreiecke", "Dreiecken"),
}
COLORS = {
    "blue": "blau",
    "green": "grün",
    "orange": "orangefarben",
    "pink": "rosafarben",
    "purple": "violett",
    "red": "rot",
    "turquoise": "türkisfarben",
    "yellow": "gelb",
}
SIZES = {
    "small": "klein",
    "large": "groß",
    "smaller": "kleiner",
    "larger": "größer",
    "smallest": "kleinst",
    "largest": "größt",
}

# By case, then masculine, feminine, neuter, plural.
_GENDERS = "mfn"
_ARTICLES = {
    "der": (
        ("der", "die", "das", "die"),
        ("den", "die", "das", "die"),
        ("dem", "der", "dem", "den"),
        ("des", "der", "des", "der"),
    )
}
_DETERMINER_ENDINGS = {
    "dieser": (("er", "e", "es", "e"), ("en", "e", "es", "e"), ("em", "er", "em", "en"), ("es", "er", "es", "er")),
    "ein": (("", "e", "", "e"), ("en", "e", "", "e"), ("em", "er", "em", "en"), ("es", "er", "es", "er")),
}
_ADJECTIVE_ENDINGS = {
    "weak": (("e", "e", "e", "en"), ("en", "e", "e", "en"), ("en",) * 4, ("en",) * 4),
    "mixed": (("er", "e", "es", "en"), ("en", "e", "es", "en"), ("en",) * 4, ("en",) * 4),
    "strong": (("er", "e", "es", "e"), ("en", "e", "es", "e"), ("em", "er", "em", "en"), ("en", "er", "en", "er")),
}
_PRONOUNS = {
    "personal": (
        ("er", "sie", "es", "sie"),
        ("ihn", "sie", "es", "sie"),
        ("ihm", "ihr", "ihm", "ihnen"),
    ),
    "relative": (
        ("der", "die", "das", "die"),
        ("den", "die", "das", "die"),
        ("dem", "der", "dem", "denen"),
    ),
}


def column(gender: str, is_plural: bool) -> int:
    """Where a noun's forms stand in a table row."""
    return 3 if is_plural else _GENDERS.index(gender)


def determiner(stem: str, declension: str, case: str, gender: str, is_plural: bool) -> str:
    """A declined determiner.

    Args:
        stem: "dies", "kein", "zwei"; of no meaning for "der".
        declension: "der", "dieser", "ein", or "none" for numerals, which keep their form.
        case: One of `CASES`.
        gender: "m", "f" or "n".
        is_plural: Of the noun.
    """
    place = CASES.index(case), column(gender, is_plural)
    if declension in _ARTICLES:
        return _ARTICLES[declension][place[0]][place[1]]
    return stem if declension == "none" else stem + _DETERMINER_ENDINGS[declension][place[0]][place[1]]


def adjective(stem: str, declension: str, case: str, gender: str, is_plural: bool) -> str:
    """A declined adjective; declension is "weak", "mixed" or "strong"."""
    return stem + _ADJECTIVE_ENDINGS[declension][CASES.index(case)][column(gender, is_plural)]


def noun(word: Noun, case: str, is_plural: bool) -> str:
    """A declined noun."""
    if is_plural:
        return word.dative_plural if case == "dative" else word.plural
    return word.genitive if case == "genitive" else word.singular


def pronoun(kind: str, case: str, gender: str, is_plural: bool) -> str:
    """A "personal" or "relative" pronoun of the third person, in any case but the genitive."""
    return _PRONOUNS[kind][CASES.index(case)][column(gender, is_plural)]
