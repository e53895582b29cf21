"""The words of the scenes' sentences beside colours, sizes and shapes, in English and German."""

from __future__ import annotations

from typing import Any

from mmattn.data.scenes.phrases import ConjugatedVerb, Determiner, Fixed, Person, Verb


def _possessive(english: str, stem: str) -> list[Determiner]:
    return [Determiner(english, stem, "ein", "mixed", plural) for plural in (False, True)]


_THE = [Determiner("the", "", "der", "weak", plural) for plural in (False, True)]
_THIS = [Determiner("this", "dies", "dieser", "weak", False), Determiner("these", "dies", "dieser", "weak", True)]
_A = Determiner("a", "ein", "ein", "mixed", False)
_BARE = Determiner("", "", "none", "strong", True)
_NUMERALS = [("two", "zwei"), ("three", "drei"), ("four", "vier"), ("five", "fünf")]
_COUNTED = [Determiner(english, stem, "none", "strong", True) for english, stem in _NUMERALS]
_OWNED = [*_possessive("my", "mein"), *_possessive("his", "sein"), *_possessive("her", "ihr")]
_NEW = [_A, _A, _A, *_COUNTED, _BARE]
_NEW += [Determiner("some", "einig", "dieser", "strong", True), Determiner("many", "viel", "dieser", "strong", True)]
_DEFINITE = [*_THE * 3, *_THIS, *_OWNED, Determiner("the", "", "der", "weak", True, ("two", "zwei"))]
_KNOWN = [
    *_DEFINITE,
    Determiner("every", "jed", "dieser", "weak", False),
    Determiner("all", "all", "dieser", "weak", True),
]

DETERMINERS = {
    "new": _NEW,
    "definite": _DEFINITE,
    "known": _KNOWN,
    "any": [*_NEW, *_KNOWN],
    "one": [_A, *(item for item in _DEFINITE if not item.is_plural)],
    "a": [_A],
    "the": _THE,
    "no": _possessive("no", "kein"),
    "which": [Determiner("which", "welch", "dieser", "weak", plural) for plural in (False, True)],
    "bare": [_BARE],
    # Not the numerals: those have a genitive of their own.
    "of": [item for item in _DEFINITE if item.numeral is None],
}
"""Determiners by the class that a sentence asks for; listed as often as they are to be drawn."""

RELATIONS = (
    Fixed("left of", "links von"),
    Fixed("right of", "rechts von"),
    Fixed("above", "über", "accusative"),
    Fixed("below", "unter", "accusative"),
    Fixed("next to", "neben", "accusative"),
    Fixed("near", "in der Nähe von"),
    Fixed("behind", "hinter", "accusative"),
    Fixed("in front of", "vor", "accusative"),
)
MOTIONS = tuple(relation for relation in RELATIONS if relation.motion_case == "accusative")
ADVERBS = (Fixed("today", "heute"), Fixed("now", "jetzt"), Fixed("sometimes", "manchmal"), Fixed("here", "hier"))
COMPARATIVES = (Fixed("larger", "größer"), Fixed("smaller", "kleiner"))
PERSONS = (
    Person("I", "ich", 0, ("I", "ich"), ("me", "mir")),
    Person("you", "du", 1, ("you", "du"), ("you", "dir")),
    Person("she", "sie", 2, ("she", "sie"), ("her", "ihr")),
    Person("he", "er", 2, ("he", "er"), ("him", "ihm")),
    Person("Anna", "Anna", 2, ("she", "sie"), ("Anna", "Anna")),
    Person("Tom", "Tom", 2, ("he", "er"), ("Tom", "Tom")),
    Person("the woman", "die Frau", 2, ("she", "sie"), ("the woman", "der Frau")),
    Person("the man", "der Mann", 2, ("he", "er"), ("the man", "dem Mann")),
    Person("we", "wir", 3, ("we", "wir"), ("us", "uns")),
    Person("they", "sie", 4, ("they", "sie"), ("them", "ihnen")),
    Person("the children", "die Kinder", 4, ("they", "sie"), ("the children", "den Kindern")),
)


def _weak(
    base: str, third: str, past: str, stem: str, *, participle: str | None = None, after: str = "", prefix: str = ""
) -> Verb:
    """A verb that is regular in German."""
    e = "e" if stem.endswith("n") else ""  # zeichnest
    present = (f"{stem}e", f"{stem}{e}st", f"{stem}{e}t", f"{stem}en")
    preterite = (f"{stem}{e}te", f"{stem}{e}test", f"{stem}{e}ten")
    infinitive, perfect = f"{prefix}{stem}en", f"{prefix}ge{stem}{e}t"
    return Verb(base, third, past, participle or past, present, preterite, infinitive, perfect, after, prefix)


def _strong(english: str, present: str, preterite: str, infinitive: str, perfect: str, **options: Any) -> Verb:
    """A verb that is not: English base, third person, past and participle; German for ich, du, er and the plural, and
    for ich, du and the plural."""
    base, third, past, participle = english.split()
    first, second, singular, plural = present.split()
    past_singular, past_second, past_plural = preterite.split()
    return Verb(
        base,
        third,
        past,
        participle,
        (first, second, singular, plural),
        (past_singular, past_second, past_plural),
        infinitive,
        perfect,
        **options,
    )


_VERBS = (
    _strong("see sees saw seen", "sehe siehst sieht sehen", "sah sahst sahen", "sehen", "gesehen"),
    _strong("find finds found found", "finde findest findet finden", "fand fandest fanden", "finden", "gefunden"),
    _strong(
        "know knows knew known",
        "kenne kennst kennt kennen",
        "kannte kanntest kannten",
        "kennen",
        "gekannt",
        is_state=True,
    ),
    _strong(
        "cross crosses crossed crossed",
        "streiche streichst streicht streichen",
        "strich strichst strichen",
        "durchstreichen",
        "durchgestrichen",
        after="out",
        prefix="durch",
    ),
    _weak("paint", "paints", "painted", "mal"),
    _weak("draw", "draws", "drew", "zeichn", participle="drawn"),
    _weak("count", "counts", "counted", "zähl"),
    _weak("look", "looks", "looked", "such", after="for"),
    _weak("pick", "picks", "picked", "such", after="out", prefix="aus"),
)
VERBS = tuple(tuple(ConjugatedVerb(verb, person) for verb in _VERBS) for person in range(5))
"""Every verb, by person."""
