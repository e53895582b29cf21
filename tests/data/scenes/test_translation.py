"""English and German sentences on scenes: right German, one translation each, gold alignments, clean splits."""

from __future__ import annotations

import itertools
import re

import pytest

from mmattn.data.scenes import german, lexicon
from mmattn.data.scenes.layout import COLORS, HELD_OUT_PAIRS, SHAPES
from mmattn.data.scenes.phrases import DE, EN, NounPhrase
from mmattn.data.scenes.sentences import KINDS, TEMPLATES
from mmattn.data.scenes.templates import Template
from mmattn.data.scenes.translation import SceneTranslations
from mmattn.data.sentence_pairs import BatchedPairs, ParallelSource
from mmattn.errors import UsageError

TRAIN = SceneTranslations("train", 12_000).pairs(range(12_000))
HELD_OUT = SceneTranslations("heldout", 2000).pairs(range(2000))
_NOUNS = {f"{shape}{ending}": shape for shape in SHAPES for ending in ("", "s", "es")}


def _words(text: str) -> list[str]:
    return re.sub("[,?]", "", text).split()


def _determiner(english: str, plural: bool = False):
    choices = itertools.chain(*lexicon.DETERMINERS.values())
    return next(one for one in choices if (one.english, one.is_plural, one.numeral) == (english, plural, None))


def _german(english: str, shape: str, case: str, *, plural: bool = False) -> str:
    phrase = NounPhrase(_determiner(english, plural), shape, "red", "large")
    return " ".join(phrase.words(DE, "", case)[0])


@pytest.mark.parametrize(
    ("determiner", "shape", "plural", "expected"),
    [
        ("a", "circle", False, ("ein großer roter Kreis", "einen großen roten Kreis", "einem großen roten Kreis")),
        ("a", "diamond", False, ("eine große rote Raute", "eine große rote Raute", "einer großen roten Raute")),
        (
            "no",
            "square",
            False,
            ("kein großes rotes Quadrat", "kein großes rotes Quadrat", "keinem großen roten Quadrat"),
        ),
        ("no", "ring", True, ("keine großen roten Ringe", "keine großen roten Ringe", "keinen großen roten Ringen")),
        ("the", "circle", False, ("der große rote Kreis", "den großen roten Kreis", "dem großen roten Kreis")),
        ("the", "cross", True, ("die großen roten Kreuze", "die großen roten Kreuze", "den großen roten Kreuzen")),
        ("this", "ring", False, ("dieser große rote Ring", "diesen großen roten Ring", "diesem großen roten Ring")),
        ("every", "diamond", False, ("jede große rote Raute", "jede große rote Raute", "jeder großen roten Raute")),
        (
            "all",
            "square",
            True,
            ("alle großen roten Quadrate", "alle großen roten Quadrate", "allen großen roten Quadraten"),
        ),
        ("two", "circle", True, ("zwei große rote Kreise", "zwei große rote Kreise", "zwei großen roten Kreisen")),
        (
            "some",
            "diamond",
            True,
            ("einige große rote Rauten", "einige große rote Rauten", "einigen großen roten Rauten"),
        ),
        ("", "triangle", True, ("große rote Dreiecke", "große rote Dreiecke", "großen roten Dreiecken")),
        (
            "his",
            "triangle",
            False,
            ("sein großes rotes Dreieck", "sein großes rotes Dreieck", "seinem großen roten Dreieck"),
        ),
        ("which", "ring", False, ("welcher große rote Ring", "welchen großen roten Ring", "welchem großen roten Ring")),
    ],
)
def test_noun_phrases_are_declined(determiner, shape, plural, expected):
    cases = german.CASES[:3]
    assert tuple(_german(determiner, shape, case, plural=plural) for case in cases) == expected


def test_genitive_and_comparison():
    assert _german("the", "circle", "genitive") == "des großen roten Kreises"
    assert _german("her", "diamond", "genitive") == "ihrer großen roten Raute"
    assert _german("these", "square", "genitive", plural=True) == "dieser großen roten Quadrate"
    for size, words in (("largest", "das größte Kreuz"), ("smaller", "das kleinere Kreuz")):
        phrase = NounPhrase(_determiner("the"), "cross", None, size)
        assert " ".join(phrase.words(DE, "", "nominative")[0]) == words
    assert " ".join(NounPhrase(_determiner("a"), "ring", "orange", None).words(EN, "", "")[0]) == "an orange ring"


_EXAMPLES = {
    "caption": (
        "a large blue square left of a small red circle",
        "ein großes blaues Quadrat links von einem kleinen roten Kreis",
    ),
    "negation": ("there is no green ring", "es gibt keinen grünen Ring"),
    "inversion": (
        "above the small square the picture shows a ring",
        "über dem kleinen Quadrat zeigt das Bild einen Ring",
    ),
    "relative": (
        "the circle that is left of the blue square is red",
        "der Kreis, der links von dem blauen Quadrat ist, ist rot",
    ),
}


def _parse(kind: str, english: str) -> set[str]:
    """German sentences that the templates of a kind give for an English one, by trying every phrase that fits."""
    found = set()
    everything = [*itertools.chain(*lexicon.DETERMINERS.values())]
    for template in TEMPLATES[kind]:
        if not template.slots <= {"a", "b", "r"}:
            continue
        nouns = [
            NounPhrase(determiner, shape, color, size)
            for determiner in dict.fromkeys(everything)
            for shape, color, size in itertools.product(SHAPES, (None, *COLORS), (None, "small", "large"))
            if _is_in(NounPhrase(determiner, shape, color, size), english)
        ]
        relations = [one for one in lexicon.RELATIONS if one.english in english]
        for fillers in itertools.product(*((relations if slot == "r" else nouns) for slot in sorted(template.slots))):
            phrases = dict(zip(sorted(template.slots), fillers, strict=True))
            try:
                sentence = template.fill(phrases)
            except KeyError:  # a colour that a predicate asks for
                continue
            if sentence.english == english:
                found.add(sentence.german)
    return found


def _is_in(phrase: NounPhrase, english: str) -> bool:
    words = phrase.words(EN, "bare", "")[0]
    told = [word for word in (phrase.size, phrase.color) if word]
    return all(word in english.split() for word in (*words, *told))


@pytest.mark.parametrize("kind", list(_EXAMPLES))
def test_examples_are_translated_as_they_should(kind):
    english, expected = _EXAMPLES[kind]
    assert _parse(kind, english) == {expected}


def _find(pattern: str) -> list[tuple[str, str]]:
    return [(pair.source, pair.target) for pair in TRAIN if re.search(pattern, pair.source)]


def test_verbs_stand_where_german_wants_them():
    for english, translated in _find("^(because|although|if) (?!of)"):
        clause, main = translated.split(", ", 1)
        assert clause.split()[0] in ("weil", "obwohl", "wenn")
        is_known = main.split()[0] in {
            form for verbs in lexicon.VERBS for verb in verbs for form in verb.words(DE, "", "")[0]
        }
        assert is_known, (english, translated)
    assert _find("^although")
    for _, translated in _find(r" out .* yesterday$"):
        assert translated.split()[-1] in ("aus", "durch")
    for _, translated in _find(r" (has|have) (crossed|picked) out "):
        assert re.search("(durchgestrichen|ausgesucht)( (habe|hast|hat|haben))?$", translated)
    for english, translated in _find(" whether "):
        assert translated.split()[-1] == ("sind" if " are " in english else "ist")


def test_prepositions_take_the_dative_at_rest_and_the_accusative_of_movement():
    for english, translated in _find("^(she|he|Anna|Tom|I) places .* above the (?!two)"):
        assert re.search(r" über (den|die|das) ", translated), english
    for english, translated in _find(r"^(the|my|her) .* (is|lies) above the (?!two)"):
        assert re.search(r" über (dem|der|den) ", translated), english


def test_pronouns_take_the_gender_of_what_they_stand_for():
    genders = {"circle": "ihn", "ring": "ihn", "diamond": "sie", "square": "es", "cross": "es", "triangle": "es"}
    checked = 0
    for pair in TRAIN:
        match = re.search(r"(\w+) and \w+( for)? it( out)?$", pair.source)
        if match and pair.kind == "pronoun":
            checked += 1
            assert genders[match[1]] in pair.target.split()[-2:], pair
    assert checked > 20


def test_translation_is_a_function_in_both_directions():
    forward, backward = {}, {}
    for pair in [*TRAIN, *HELD_OUT]:
        assert forward.setdefault(pair.source, pair.target) == pair.target
        assert backward.setdefault(pair.target, pair.source) == pair.source
    assert len(forward) > 13_000


def test_every_word_is_aligned_and_nouns_to_their_translations():
    for pair in TRAIN[:3000]:
        source, target = pair.source.split(), pair.target.split()
        assert pair.alignment is not None
        assert pair.alignment == tuple(sorted(set(pair.alignment)))
        assert {one for one, _ in pair.alignment} == set(range(len(source)))
        assert {other for _, other in pair.alignment} == set(range(len(target)))
        for one, other in pair.alignment:
            word, translation = (re.sub("[,?]", "", text) for text in (source[one], target[other]))
            if word in COLORS:
                assert translation.startswith(german.COLORS[word])
            elif word in _NOUNS and translation[0].isupper():
                noun = german.NOUNS[_NOUNS[word]]
                assert translation in (noun.singular, noun.genitive, noun.plural, noun.dative_plural)


def test_alignment_example():
    template = TEMPLATES["negation"][0]
    sentence = template.fill({"a": NounPhrase(_determiner("no"), "ring", "green", None)})
    assert sentence == ("there is no green ring", "es gibt keinen grünen Ring", tuple((n, n) for n in range(5)))
    verb = next(one for one in lexicon.VERBS[2] if one.verb.prefix == "aus")
    anna = next(one for one in lexicon.PERSONS if one.english == "Anna")
    phrases = {"s": anna, "v": verb, "a": NounPhrase(_determiner("the"), "ring", "red", None)}
    asked = next(one for one in TEMPLATES["question"] if one.english == "{s.does}/v@2 {s} {v.base} {a}?")
    assert asked.fill(phrases) == (
        "does Anna pick out the red ring?",
        "sucht Anna den roten Ring aus?",
        ((0, 0), (1, 1), (2, 0), (3, 5), (4, 2), (5, 3), (6, 4)),
    )


def test_splits_share_no_sentence_and_hold_out_pairs():
    by_split = {split: SceneTranslations(split, 500, seed=3).pairs(range(500)) for split in ("validation", "test")}
    texts = [{pair.source for pair in pairs} for pairs in (TRAIN, HELD_OUT, *by_split.values())]
    for one, other in itertools.combinations(texts, 2):
        assert not one & other
    for pair in [*TRAIN, *by_split["test"], *by_split["validation"]]:
        assert not _held_out(pair.source), pair.source
    assert sum(_held_out(pair.source) for pair in HELD_OUT) > 0.7 * len(HELD_OUT)
    words = {word for pair in TRAIN for word in _words(f"{pair.source} {pair.target}")}
    assert {word for pair in HELD_OUT for word in _words(f"{pair.source} {pair.target}")} <= words


def _held_out(text: str) -> bool:
    words = _words(text)
    return any((color, _NOUNS.get(noun)) in HELD_OUT_PAIRS for color, noun in itertools.pairwise(words))


def test_predicates_tell_the_held_out_colour_too():
    for pair in HELD_OUT:
        words = _words(pair.source)
        named = {(color, shape) for color in COLORS if color in words for word in words if (shape := _NOUNS.get(word))}
        assert named & HELD_OUT_PAIRS, pair.source


def test_pairs_are_a_function_of_seed_split_and_index():
    data = SceneTranslations("train", 12_000)
    assert isinstance(data, ParallelSource)
    assert isinstance(data, BatchedPairs)
    assert data[117] == TRAIN[117] == data.pairs([4, 117])[1]
    assert data.pairs([9, 9, 2]) == [TRAIN[9], TRAIN[9], TRAIN[2]]
    assert SceneTranslations("train", 20, seed=1)[5] != TRAIN[5]
    assert {pair.kind for pair in TRAIN} == set(KINDS)
    assert (data.name, TRAIN[3].id, len(data)) == ("scenes/train", "scenes/train/3", 12_000)
    with pytest.raises(IndexError, match="scenes/train has 12000 pairs, no number 12000"):
        data[12_000]


def test_the_other_direction_is_the_same_turned_round():
    turned = SceneTranslations("train", 50, src_lang="de", tgt_lang="en").pairs(range(50))
    for one, other in zip(TRAIN, turned, strict=False):
        assert (one.source, one.target, one.src_lang, one.tgt_lang) == (other.target, other.source, "en", "de")
        assert (other.src_lang, other.tgt_lang) == ("de", "en")
        assert other.alignment == tuple(sorted((target, source) for source, target in one.alignment or ()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 0}, "a scenes data set needs a size of 1 or more, not 0"),
        ({"split": "dev"}, "unknown scenes split 'dev': use one of train, validation, test, heldout"),
        ({"tgt_lang": "fr"}, "scenes are translated from en to de or from de to en, not from en to fr"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(UsageError, match=message):
        SceneTranslations(**arguments)


@pytest.mark.parametrize(
    ("english", "translated", "message"),
    [
        ("{a} {a.is} red", "{a:nom} {a.is} rot", "nothing stands for 'red'; give it a key"),
        ("{a} is/1", "{a:nom} ist", "nothing stands for 'ist'; give it a key"),
        ("{a} is/1", "{a:nom}", "only one language has 1"),
        ("{a} {r} {b}", "{a:nom}", "only one language has b, r"),
        ("{a b}", "{a:nom}", "cannot read '{a'"),
    ],
)
def test_templates_that_do_not_add_up_are_refused(english, translated, message):
    with pytest.raises(ValueError, match=message):
        Template("statement", "a=new b=new", english, translated)
