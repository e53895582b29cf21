"""Sentence templates in two languages, from which word alignments come by construction.

A template is a row of tokens for each language:

- `word`: stands as it is. `word/key` is a translation of the other language's words with the same key. Words without a
  key that `_TRANSLATIONS` knows are matched by it.
- `{a}`, `{a.form}`, `{a.form:case}`: the words of the phrase in place `a`, or one word that agrees with it
  (`{a.is}` is "is" or "are"). The same place and form in both languages are translations of each other; `#2` tells a
  second use apart. Cases are nom, acc, dat, gen, and `:r` for the case that preposition `r` asks for in a movement.
- A comma or question mark after a token belongs to the word before it.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from mmattn.data.scenes.phrases import DE, EN, Fixed, Phrase

_CASES = {"nom": "nominative", "acc": "accusative", "dat": "dative", "gen": "genitive"}
# Forms of a place's own words; all others are words that agree with it.
_NOUN_FORMS = ("", "bare", "colored", "sized", "object")
_VERB_FORMS = (
    ("base", "past", "participle", "split", "split_base", "out"),
    ("past", "participle", "infinitive", "final", "particle"),
)
_OWN_FORMS = {*_NOUN_FORMS, *_VERB_FORMS[EN], *_VERB_FORMS[DE]}
_BLOCK = 8  # keys kept for the words of one place
_TOKEN = re.compile(
    r"\{(?P<slot>[a-z])(\.(?P<form>\w+))?(?P<number>#\d)?(:(?P<case>\w+))?\}(/(?P<key>[^,?]+))?(?P<mark>[,?]?)"
)
_TRANSLATIONS = {
    "although": ("obwohl",),
    "and": ("und",),
    "because": ("weil",),
    "between": ("zwischen",),
    "but": ("aber", "sondern"),
    "by": ("von",),
    "center": ("Mitte",),
    "color": ("Farbe",),
    "how": ("wie",),
    "if": ("wenn",),
    "it": ("es",),
    "many": ("viele",),
    "neither": ("weder",),
    "nor": ("noch",),
    "not": ("nicht",),
    "of": ("von",),
    "or": ("oder",),
    "picture": ("Bild",),
    "shows": ("zeigt",),
    "than": ("als",),
    "that": ("dass",),
    "the": ("das", "die", "dem"),
    "there": ("es",),
    "what": ("welche",),
    "where": ("wo",),
    "whether": ("ob",),
    "why": ("warum",),
    "with": ("mit",),
    "yesterday": ("gestern",),
}


class Sentence(NamedTuple):
    """A sentence in both languages, and which words (split at spaces) stand for each other: (English, German)."""

    english: str
    german: str
    alignment: tuple[tuple[int, int], ...]


Side = tuple[list[str], list[tuple[int, ...]]]
"""The words of one language, and the keys of each."""


class _Op(NamedTuple):
    """One token. `slot` is "" for a fixed word; `base` is the first key of a place's own words, or None."""

    slot: str
    text: str  # the word, or the form
    case: str
    base: int | None
    keys: tuple[int, ...]
    mark: str


@dataclass(frozen=True)
class Template:
    """One sentence pattern.

    Args:
        kind: Names the sort of sentence, for scores by kind.
        places: "a=new b=known": the class of determiner for each noun phrase; ":plain" after it for no size,
            ":comparative" or ":superlative" for such a size.
        english, german: Rows of tokens; see the module.

    Attributes:
        noun_places: (place, class of determiner, kind of size or "").
        slots: Every place.
        uses: "a.size" and the like, every form of every place.

    Raises:
        ValueError: a token that cannot be read, or a key that only one language has.
    """

    kind: str
    places: str
    english: str
    german: str
    noun_places: tuple[tuple[str, str, str], ...] = field(init=False)
    slots: frozenset[str] = field(init=False)
    uses: frozenset[str] = field(init=False)
    _ops: tuple[tuple[_Op, ...], tuple[_Op, ...]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        ops = _Compiler(self).ops
        object.__setattr__(self, "_ops", ops)
        places = [place.split("=") for place in self.places.split()]
        nouns = [(slot, *asked.partition(":")[::2]) for slot, asked in places]
        object.__setattr__(self, "noun_places", tuple(nouns))
        every = [op for side in ops for op in side if op.slot]
        object.__setattr__(self, "slots", frozenset(op.slot for op in every))
        object.__setattr__(self, "uses", frozenset(f"{op.slot}.{op.text}" for op in every))

    def english_side(self, phrases: Mapping[str, Phrase]) -> Side:
        """The English words with these phrases in the places."""
        return _side(self._ops[EN], EN, phrases)

    def fill(self, phrases: Mapping[str, Phrase], english: Side | None = None) -> Sentence:
        """The sentence with these phrases in the places; `english` where that side is known already."""
        source, source_keys = english or self.english_side(phrases)
        target, target_keys = _side(self._ops[DE], DE, phrases)
        places: dict[int, tuple[int, ...]] = {}
        for place, keys in enumerate(source_keys):
            for key in keys:
                places[key] = (*places[key], place) if key in places else (place,)
        links = [
            (found, place) for place, keys in enumerate(target_keys) for key in keys for found in places.get(key, ())
        ]
        return Sentence(" ".join(source), " ".join(target), tuple(sorted(set(links))))


@functools.cache
def _numbered(base: int, offsets: tuple[tuple[int, ...], ...]) -> list[tuple[int, ...]]:
    return [tuple(base + offset for offset in some) for some in offsets]


def _side(ops: tuple[_Op, ...], language: int, phrases: Mapping[str, Phrase]) -> Side:
    words: list[str] = []
    keys: list[tuple[int, ...]] = []
    for slot, text, case, base, own_keys, mark in ops:
        if not slot:
            words.append(text)
            keys.append(own_keys)
        elif base is None:
            words.append(phrases[slot].agreeing(language, text, case))
            keys.append(own_keys)
        else:
            if len(case) == 1:  # a place whose preposition decides
                preposition = phrases[case]
                assert isinstance(preposition, Fixed)
                case = preposition.motion_case
            own_words, offsets = phrases[slot].words(language, text, case)
            words.extend(own_words)
            keys.extend(_numbered(base, offsets))
        if mark:
            words[-1] += mark
    return words, keys


class _Compiler:
    """Reads the tokens of one template and numbers their keys."""

    def __init__(self, template: Template) -> None:
        self._name = f"template {template.english!r}"
        self._numbers: dict[str, int] = {}
        self._blocks: dict[str, int] = {}
        sides = [[self._read(token) for token in side.split()] for side in (template.english, template.german)]
        self._match_words(sides[EN], sides[DE])
        self.ops = tuple(sides[EN]), tuple(sides[DE])
        self._check()

    def _read(self, token: str) -> _Op:
        match = _TOKEN.fullmatch(token)
        if match is None:
            if "{" in token:
                raise ValueError(f"{self._name}: cannot read {token!r}")
            mark = token[-1] if token[-1] in ",?" else ""
            word, _, key = token.removesuffix(mark).partition("/")
            return _Op("", word, "", None, (self._key(key),) if key else (), mark)
        slot, form, number = match["slot"], match["form"] or "", match["number"] or ""
        case = _CASES.get(match["case"] or "nom", match["case"] or "")
        if form in _OWN_FORMS:
            return _Op(slot, form, case, self._block(slot), (), match["mark"])
        key = match["key"] or f"{slot}.{form}{number}"
        return _Op(slot, form, case, None, (self._key(key),), match["mark"])

    def _block(self, slot: str) -> int:
        return self._blocks.setdefault(slot, _BLOCK * len(self._blocks))

    def _key(self, label: str) -> int:
        """A number for a label; "v@2" is the word with offset 2 in place v."""
        slot, at, offset = label.partition("@")
        if at:
            return self._block(slot) + int(offset)
        return self._numbers.setdefault(label, 1000 + len(self._numbers))

    def _match_words(self, english: list[_Op], german: list[_Op]) -> None:
        for place, op in enumerate(english):
            if op.slot or op.keys:
                continue
            wanted = _TRANSLATIONS.get(op.text, ())
            other = next((i for i, o in enumerate(german) if not o.slot and not o.keys and o.text in wanted), None)
            if other is None:
                raise ValueError(f"{self._name}: nothing stands for {op.text!r}; give it a key")
            keys = (self._key(f"word {place}"),)
            english[place], german[other] = op._replace(keys=keys), german[other]._replace(keys=keys)

    def _check(self) -> None:
        for op in self.ops[DE]:
            if not op.slot and not op.keys:
                raise ValueError(f"{self._name}: nothing stands for {op.text!r}; give it a key")
        single = [{key for op in side for key in op.keys if key >= 1000} for side in self.ops]
        if single[EN] != single[DE]:
            odd = {label for label, key in self._numbers.items() if key in single[EN] ^ single[DE]}
            raise ValueError(f"{self._name}: only one language has {', '.join(sorted(odd))}")
        slots = [{op.slot for op in side if op.slot} for side in self.ops]
        if slots[EN] != slots[DE]:
            raise ValueError(f"{self._name}: only one language has {', '.join(sorted(slots[EN] ^ slots[DE]))}")
