"""Scenes as parallel text: English and German sentences with gold word alignments, made when asked for.

Each English sentence has exactly one German translation here, and the other way round, so that exact match can be
scored. Sentences start in lower case and end without a full stop, as captions do; punctuation stays on the word before.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from typing import TypeVar

from mmattn.data.draws import uniform_rows
from mmattn.data.scenes import lexicon
from mmattn.data.scenes.layout import HELD_OUT_PAIRS, SHAPES, SIZES, SPLITS, TRAINED_PAIRS
from mmattn.data.scenes.phrases import ConjugatedVerb, NounPhrase, Person, Phrase
from mmattn.data.scenes.sentences import KINDS, TEMPLATES
from mmattn.data.scenes.templates import Sentence, Template
from mmattn.data.sentence_pairs import SentencePair
from mmattn.errors import UsageError

_T = TypeVar("_T")

LANGUAGES = ("en", "de")
_DRAWS = 40
_MAX_ROUNDS = 1000
_HELD_OUT_ORDERED = tuple(sorted(HELD_OUT_PAIRS))
_TRAINED_COLORS = {shape: [color for color, other in TRAINED_PAIRS if other == shape] for shape in SHAPES}
_COMPARED = {"plain": (None,), "comparative": ("smaller", "larger"), "superlative": ("smallest", "largest")}
# "in der Nähe von ihm" is what nobody says.
_WITH_PRONOUNS = tuple(relation for relation in lexicon.RELATIONS if relation.english != "near")
_ACTIONS = tuple(tuple(verb for verb in verbs if not verb.verb.is_state) for verbs in lexicon.VERBS)
# Out of ten, by a checksum of the sentence: no sentence stands in two of them, whatever their seeds.
_SHARES = {"train": range(8), "validation": range(8, 9), "test": range(9, 10), "heldout": range(10)}


class SceneTranslations:
    """Sentences on scenes with their translations; a `ParallelSource`.

    Pair i is a pure function of (seed, split, i). No sentence stands in two splits.

    Args:
        split: "train", "validation" and "test" name pairs of colour and shape that training names; every "heldout"
            sentence has one that training never has.
        size: Number of pairs.
        seed: Other seeds give other sentences; the held-out pairs stay.
        src_lang, tgt_lang: "en" and "de", or the other way round.

    Raises:
        UsageError: an argument that is none of these.
    """

    def __init__(
        self, split: str = "train", size: int = 100_000, seed: int = 0, *, src_lang: str = "en", tgt_lang: str = "de"
    ) -> None:
        if size < 1:
            raise UsageError(f"a scenes data set needs a size of 1 or more, not {size}")
        if split not in SPLITS:
            raise UsageError(f"unknown scenes split {split!r}: use one of {', '.join(SPLITS)}")
        if sorted((src_lang, tgt_lang)) != sorted(LANGUAGES):
            raise UsageError(f"scenes are translated from en to de or from de to en, not from {src_lang} to {tgt_lang}")
        self.split, self.size, self.seed = split, size, seed
        self.src_lang, self.tgt_lang = src_lang, tgt_lang

    @property
    def name(self) -> str:
        """Names the data set in messages."""
        return f"scenes/{self.split}"

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> SentencePair:
        return self.pairs([index])[0]

    def __iter__(self) -> Iterator[SentencePair]:
        return (self[index] for index in range(self.size))

    def pairs(self, indices: Sequence[int]) -> list[SentencePair]:
        """Many pairs at once, which is faster."""
        for index in indices:
            if not 0 <= index < self.size:
                raise IndexError(f"{self.name} has {self.size} pairs, no number {index}")
        drawn = draw_sentences(self.seed, self.split, indices)
        return [self._pair(index, kind, sentence) for index, (kind, sentence) in zip(indices, drawn, strict=True)]

    def _pair(self, index: int, kind: str, sentence: Sentence) -> SentencePair:
        english, german_text, alignment = sentence
        name = f"{self.name}/{index}"
        if self.src_lang == "en":
            return SentencePair(name, english, german_text, "en", "de", alignment, kind)
        turned = tuple(sorted((target, source) for source, target in alignment))
        return SentencePair(name, german_text, english, "de", "en", turned, kind)


def draw_sentences(seed: int, split: str, indices: Sequence[int]) -> list[tuple[str, Sentence]]:
    """(kind, sentence) for each example number; drawn again until the sentence belongs to the split."""
    share = _SHARES[split]
    found: dict[int, tuple[str, Sentence]] = {}
    todo = sorted(set(indices))
    for attempt in range(_MAX_ROUNDS):
        rows = uniform_rows(seed, f"scenes/translation/{split}/{attempt}", todo, _DRAWS)
        for index, row in zip(todo, rows.tolist(), strict=True):
            template, phrases = _draw_phrases(_Dice(row), split)
            english = template.english_side(phrases)
            if zlib.crc32(" ".join(english[0]).encode()) % 10 in share:
                found[index] = template.kind, template.fill(phrases, english)
        todo = [index for index in todo if index not in found]
        if not todo:
            return [found[index] for index in indices]
    raise AssertionError(f"found no sentence for split {split}")


class _Dice:
    """Spends a row of uniform numbers."""

    def __init__(self, row: list[float]) -> None:
        self._next = iter(row).__next__

    def pick(self, choices: Sequence[_T]) -> _T:
        return choices[int(self._next() * len(choices))]

    def chance(self, probability: float) -> bool:
        return self._next() < probability


def _draw_phrases(dice: _Dice, split: str) -> tuple[Template, dict[str, Phrase]]:
    template = dice.pick(TEMPLATES[dice.pick(KINDS)])
    phrases = _draw_noun_phrases(dice, template, split)
    slots = template.slots
    if "r" in slots:
        choices = _WITH_PRONOUNS if template.uses & {"a.him", "b.which"} else lexicon.RELATIONS
        relation = phrases["r"] = dice.pick(choices)
        if "q" in slots:
            phrases["q"] = dice.pick([other for other in choices if other is not relation])
    for slot, choices in (("m", lexicon.MOTIONS), ("t", lexicon.ADVERBS), ("g", lexicon.COMPARATIVES)):
        if slot in slots:
            phrases[slot] = dice.pick(choices)
    if "s" in slots:
        _draw_persons(dice, template, phrases)
    return template, phrases


def _draw_noun_phrases(dice: _Dice, template: Template, split: str) -> dict[str, Phrase]:
    """All of different pairs of colour and shape; place a always tells its colour."""
    phrases: dict[str, Phrase] = {}
    taken: list[tuple[str, str]] = []
    for slot, determiners, size_kind in template.noun_places:
        is_first = slot == "a"
        pair = dice.pick(_HELD_OUT_ORDERED if is_first and split == "heldout" else TRAINED_PAIRS)
        while pair in taken:
            pair = TRAINED_PAIRS[(TRAINED_PAIRS.index(pair) + 1) % len(TRAINED_PAIRS)]
        taken.append(pair)
        color, shape = pair
        has_color = is_first or dice.chance(0.85)
        has_size = dice.chance(0.5) or f"{slot}.size" in template.uses
        size = dice.pick(_COMPARED[size_kind] if size_kind else SIZES if has_size else (None,))
        other_color = ""
        if f"{slot}.color2" in template.uses:
            other_color = dice.pick([other for other in _TRAINED_COLORS[shape] if other != color])
        determiner = dice.pick(lexicon.DETERMINERS[determiners])
        phrases[slot] = NounPhrase(determiner, shape, color if has_color else None, size, other_color)
    return phrases


def _draw_persons(dice: _Dice, template: Template, phrases: dict[str, Phrase]) -> None:
    """Who acts, and verbs in the right person."""
    slots, uses = template.slots, template.uses
    subject = phrases["s"] = dice.pick(lexicon.PERSONS)
    persons: dict[str, Person] = {"v": subject, "w": subject, "p": subject}
    if "u" in slots:
        other = dice.pick([person for person in lexicon.PERSONS if person is not subject])
        phrases["u"] = persons["x"] = other
    verbs: list[ConjugatedVerb] = []
    for slot in "vwxp":
        if slot in slots:
            is_action = f"{slot}.participle" in uses or f"{slot}.infinitive" in uses
            choices = (_ACTIONS if is_action else lexicon.VERBS)[persons[slot].person]
            verb = dice.pick([choice for choice in choices if all(choice.verb is not one.verb for one in verbs)])
            verbs.append(verb)
            phrases[slot] = verb
