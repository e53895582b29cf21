"""What fills the places of a sentence: noun phrases, persons, verbs, prepositions, each in English and in German.

Every word comes with offsets that say what it stands for within its phrase: an English and a German word that share
one are translations of each other. Word alignments are read off them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from mmattn.data.scenes import german

EN, DE = 0, 1
MAIN, PARTICLE, AUXILIARY = 0, 1, 2  # offsets of a verb's words
_SINGULAR_THIRD = 2

Words = tuple[tuple[str, ...], tuple[tuple[int, ...], ...]]
"""Words, and the offsets of each."""


def _in_order(words: Sequence[str]) -> Words:
    """Words of which each stands for the one at its place in the other language."""
    return tuple(words), tuple((place,) for place in range(len(words)))


class Phrase(Protocol):
    """Fills a place of a sentence."""

    def words(self, language: int, form: str, case: str) -> Words:
        """The words of the phrase itself, in a form ("" for its own) and, for German, a case."""
        ...

    def agreeing(self, language: int, form: str, case: str) -> str:
        """One word of another phrase, in the form that agrees with this one: "is" or "are", "ist" or "sind"."""
        ...


@dataclass(frozen=True, eq=False)  # by identity, for it keys a cache
class Determiner:
    """A determiner, the number it asks for, and the German adjectives after it.

    Args:
        english: "" for none.
        stem: The German stem, for `german.determiner`.
        declension: Of the determiner.
        adjectives: "weak", "mixed" or "strong".
        is_plural: Of the noun.
        numeral: English and German numeral between determiner and adjectives.
    """

    english: str
    stem: str
    declension: str
    adjectives: str
    is_plural: bool
    numeral: tuple[str, str] | None = None


_ENGLISH_PLURALS = {"cross": "crosses"}

# Singular and plural in English and German, for verbs that agree with a noun phrase.
_AGREEING_VERBS = {
    "is": (("is", "are"), ("ist", "sind")),
    "has": (("is", "are"), ("hat", "haben")),  # "what color is" is "welche Farbe hat"
    "was": (("was", "were"), ("wurde", "wurden")),
    "lies": (("lies", "lie"), ("liegt", "liegen")),
    "resembles": (("resembles", "resemble"), ("ähnelt", "ähneln")),
}
_AGREEING_PRONOUNS = {
    "it": (("it", "they"), "personal"),
    "him": (("it", "them"), "personal"),
    "that": (("that", "that"), "relative"),
    "which": (("which", "which"), "relative"),
}


@dataclass(frozen=True)
class NounPhrase:
    """A shape with what is said of it; `size` and `color` may be left out.

    Forms: "" in full, "bare" without size and colour, "colored" without size, "sized" without colour. Agreeing: verbs,
    pronouns, and the undeclined "color", "color2" and "size" of a predicate.
    """

    determiner: Determiner
    shape: str
    color: str | None
    size: str | None
    other_color: str = ""

    def words(self, language: int, form: str, case: str) -> Words:
        """The declined words, in the same order in both languages."""
        size = self.size if form in ("", "sized") else None
        color = self.color if form in ("", "colored") else None
        return _noun_phrase(language, self.determiner, size, color, self.shape, case)

    def agreeing(self, language: int, form: str, case: str) -> str:
        """A word that agrees in number, and in gender where it is a pronoun."""
        plural = self.determiner.is_plural
        if form in _AGREEING_VERBS:
            return _AGREEING_VERBS[form][language][plural]
        if form in _AGREEING_PRONOUNS:
            english, kind = _AGREEING_PRONOUNS[form]
            gender = german.NOUNS[self.shape].gender
            return english[plural] if language == EN else german.pronoun(kind, case, gender, plural)
        table, word = {
            "color": (german.COLORS, self.color or ""),
            "color2": (german.COLORS, self.other_color),
            "size": (german.SIZES, self.size or ""),
        }[form]
        return word if language == EN else table[word]


@functools.cache
def _noun_phrase(
    language: int, determiner: Determiner, size: str | None, color: str | None, shape: str, case: str
) -> Words:
    plural, told = determiner.is_plural, [word for word in (size, color) if word is not None]
    if language == EN:
        words = [determiner.english] if determiner.english else []
        words += [determiner.numeral[EN]] if determiner.numeral else []
        words += [*told, _ENGLISH_PLURALS.get(shape, f"{shape}s") if plural else shape]
        if words[0] == "a" and words[1][0] in "aeiou":
            words[0] = "an"
    else:
        noun = german.NOUNS[shape]
        word = german.determiner(determiner.stem, determiner.declension, case, noun.gender, plural)
        words = [word] if word else []
        words += [determiner.numeral[DE]] if determiner.numeral else []
        stems = [german.SIZES.get(word) or german.COLORS[word] for word in told]
        words += [german.adjective(stem, determiner.adjectives, case, noun.gender, plural) for stem in stems]
        words.append(german.noun(noun, case, plural))
    return _in_order(words)


@dataclass(frozen=True)
class Fixed:
    """A preposition, adverb or adjective that nothing changes.

    Words stand for each other in order where there are equally many, else all for all.

    Args:
        english, german: The words.
        motion_case: The German case after the preposition where something is moved to.
    """

    english: str
    german: str
    motion_case: str = "dative"
    _sides: tuple[Words, Words] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        sides = self.english.split(), self.german.split()
        is_even = len(sides[EN]) == len(sides[DE])
        words = [_in_order(side) if is_even else (tuple(side), ((0,),) * len(side)) for side in sides]
        object.__setattr__(self, "_sides", tuple(words))

    def words(self, language: int, form: str, case: str) -> Words:
        """The words; form and case change nothing."""
        return self._sides[language]

    def agreeing(self, language: int, form: str, case: str) -> str:
        """Nothing agrees with it."""
        raise KeyError(form)


# English for the third person singular and for the others; German for ich, du, er, wir and sie.
_PERSON_VERBS = {
    "does": (("does", "do"), ("",) * 5),
    "has": (("has", "have"), ("habe", "hast", "hat", "haben", "haben")),
    "can": (("can", "can"), ("kann", "kannst", "kann", "können", "können")),
    "wants": (("wants", "want"), ("will", "willst", "will", "wollen", "wollen")),
    "knows": (("knows", "know"), ("weiß", "weißt", "weiß", "wissen", "wissen")),
    "thinks": (("thinks", "think"), ("glaube", "glaubst", "glaubt", "glauben", "glauben")),
    "says": (("says", "say"), ("sage", "sagst", "sagt", "sagen", "sagen")),
    "asks": (("asks", "ask"), ("frage", "fragst", "fragt", "fragen", "fragen")),
    "places": (("places", "place"), ("lege", "legst", "legt", "legen", "legen")),
    "placed": (("placed", "placed"), ("legte", "legtest", "legte", "legten", "legten")),
}


@dataclass(frozen=True)
class Person:
    """Who does something.

    Args:
        english, german: The subject, equally many words in both.
        person: 0 to 4: ich, du, er / sie / es, wir, sie.
        pronoun: English and German pronoun that refers back to it.
        objects: English and German words after "by" and "von".
    """

    english: str
    german: str
    person: int
    pronoun: tuple[str, str]
    objects: tuple[str, str]
    _sides: dict[str, tuple[Words, Words]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        texts = {"": (self.english, self.german), "object": self.objects}
        sides = {form: (_in_order(english.split()), _in_order(de.split())) for form, (english, de) in texts.items()}
        object.__setattr__(self, "_sides", sides)

    def words(self, language: int, form: str, case: str) -> Words:
        """The subject, or in form "object" what stands after "by"."""
        return self._sides[form][language]

    def agreeing(self, language: int, form: str, case: str) -> str:
        """Verbs in this person, and the form "pronoun"."""
        if form == "pronoun":
            return self.pronoun[language]
        english, german_forms = _PERSON_VERBS[form]
        return english[self.person != _SINGULAR_THIRD] if language == EN else german_forms[self.person]


@dataclass(frozen=True)
class Verb:
    """A transitive verb.

    Args:
        base, third, past, participle: English forms.
        present: German, for ich, du, er and the plural.
        preterite: German, for ich and er, for du, and for the plural.
        infinitive, perfect: German infinitive and participle, with the prefix.
        after: English word after the verb ("for", "out").
        prefix: Separable German prefix.
        is_state: Whether it is used in the present and past only.
    """

    base: str
    third: str
    past: str
    participle: str
    present: tuple[str, str, str, str]
    preterite: tuple[str, str, str]
    infinitive: str
    perfect: str
    after: str = ""
    prefix: str = ""
    is_state: bool = False


@dataclass(frozen=True)
class ConjugatedVerb:
    """A verb in one person.

    English forms: "", "base", "past", "participle"; before a pronoun, "split" and "split_base" without a word like
    "out", which is then "out" (and may be nothing). German forms: "", "past", "participle", "infinitive" and, in
    subordinate clauses, "final". Of a separable verb, "" and "past" are without the prefix, which is "particle" (and
    may be nothing).
    """

    verb: Verb
    person: int
    _forms: tuple[dict[str, Words], dict[str, Words]] = field(init=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_forms", (self._english(), self._german()))

    def words(self, language: int, form: str, case: str) -> Words:
        """The words of a form."""
        return self._forms[language][form]

    def agreeing(self, language: int, form: str, case: str) -> str:
        """Nothing agrees with it."""
        raise KeyError(form)

    def _english(self) -> dict[str, Words]:
        verb = self.verb
        finite = verb.third if self.person == _SINGULAR_THIRD else verb.base
        after = (verb.after,) if verb.after else ()
        out, kept = (after, ()) if verb.prefix else ((), after)
        words = {"": finite, "base": verb.base, "past": verb.past, "participle": verb.participle}
        offsets = ((MAIN,), *((PARTICLE if verb.prefix else MAIN,) for _ in after))
        forms: dict[str, Words] = {form: ((word, *after), offsets) for form, word in words.items()}
        for form, word in (("split", finite), ("split_base", verb.base)):
            forms[form] = (word, *kept), offsets[: 1 + len(kept)]
        return {**forms, "out": (out, ((PARTICLE,),) * len(out))}

    def _german(self) -> dict[str, Words]:
        verb, present = self.verb, min(self.person, 3)
        finite, past = verb.present[present], verb.preterite[(0, 1, 0, 2)[present]]
        return {
            "": ((finite,), ((MAIN, AUXILIARY),)),
            "past": ((past,), ((MAIN, AUXILIARY),)),
            "particle": ((verb.prefix,), ((PARTICLE,),)) if verb.prefix else ((), ()),
            "final": ((verb.prefix + finite,), ((MAIN, PARTICLE, AUXILIARY),)),
            "participle": ((verb.perfect,), ((MAIN, PARTICLE),)),
            "infinitive": ((verb.infinitive,), ((MAIN, PARTICLE),)),
        }
