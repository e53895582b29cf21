"""Word alignments: pieces to words, and the attention of what was translated."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mmattn.inference.alignments import Alignment, align_words, join_alignments
from mmattn.inference.decode import decode
from tests.inference.tiny_translators import ENGLISH, KINDS, LANGUAGES

SPECIAL = frozenset({"</s>", ">>deu<<"})


def test_pieces_are_grouped_into_words():
    source = [">>deu<<", "▁two", "▁", "d", "ogs", "▁.", "</s>"]
    target = ["▁zwei", "▁Hun", "de", "▁.", "</s>"]
    weights = np.arange(35, dtype=np.float64).reshape(5, 7)
    found = align_words(source, target, weights, SPECIAL)
    assert found.source == ["two", "dogs", "."]
    assert found.target == ["zwei", "Hunde", "."]
    # The pieces of a source word are added up, those of a target word averaged; special ones are left out.
    by_source = np.stack([weights[:, 1], weights[:, 2:5].sum(axis=1), weights[:, 5]], axis=1)
    expected = np.stack([by_source[0], by_source[1:3].mean(axis=0), by_source[3]])
    np.testing.assert_allclose(found.weights, expected)
    assert found.weights.dtype == np.float32


@pytest.mark.parametrize(
    ("pieces", "words"),
    [
        (["▁a", "▁b"], ["a", "b"]),
        (["a", "b", "▁c"], ["ab", "c"]),
        (["▁", "a"], ["a"]),
        (["▁", "▁a", "▁"], ["a"]),
        (["▁a", "</s>", "b"], ["ab"]),
        (["▁a", "", "b"], ["ab"]),
        (["</s>"], []),
        ([], []),
    ],
)
def test_words_of_pieces(pieces, words):
    found = align_words(pieces, pieces, np.ones((len(pieces), len(pieces))), SPECIAL)
    assert found.source == found.target == words
    assert found.weights.shape == (len(words), len(words))


def test_an_unknown_word_is_one_in_the_source_only():
    pieces = ["▁a", "▁", "<unk>", "▁b"]
    found = align_words(pieces, pieces, np.eye(4), SPECIAL, unknown="<unk>")
    assert found.source == ["a", "<unk>", "b"]
    assert found.target == ["a", "b"], "the text of the translation leaves it out"
    np.testing.assert_array_equal(found.weights, [[1, 0, 0], [0, 0, 1]])


def test_each_target_word_has_its_strongest_source_word():
    alignment = Alignment(["a", "b"], ["x", "y", "z"], np.array([[0.1, 0.9], [0.8, 0.2], [0.5, 0.5]], dtype=np.float32))
    assert alignment.pairs() == [(1, 0), (0, 1), (0, 2)]
    assert alignment.words() == [("b", "x"), ("a", "y"), ("a", "z")]
    assert Alignment([], ["x"], np.zeros((1, 0), dtype=np.float32)).pairs() == []


def test_joined_alignments_are_blocks():
    parts = [
        Alignment(["a", "b"], ["x"], np.array([[0.25, 0.75]], dtype=np.float32)),
        Alignment([], [], np.zeros((0, 0), dtype=np.float32)),
        Alignment(["c"], ["y", "z"], np.array([[1.0], [0.5]], dtype=np.float32)),
    ]
    found = join_alignments(parts)
    assert (found.source, found.target) == (["a", "b", "c"], ["x", "y", "z"])
    np.testing.assert_array_equal(found.weights, [[0.25, 0.75, 0], [0, 0, 1.0], [0, 0, 0.5]])
    assert join_alignments([]).weights.shape == (0, 0)


def _words(pieces, special):
    """Words and the numbers of their pieces, found again by other means: joined, then split at the spaces."""
    spelled = [("" if piece in special else piece or "") for piece in pieces]
    words, places = [], []
    for number, piece in enumerate(spelled):
        if not piece:
            continue
        if piece.startswith("▁") or not words:
            words.append("")
            places.append([])
        words[-1] += piece.replace("▁", "")
        places[-1].append(number)
    kept = [number for number, word in enumerate(words) if word]
    return [words[number] for number in kept], [places[number] for number in kept]


@pytest.mark.parametrize("num_beams", [1, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_alignments_are_the_attention_of_the_finished_text(translators, kind, num_beams):
    translator, languages = translators[kind], LANGUAGES[kind]
    tokenizer, network = translator.tokenizer, translator.network
    special = {"</s>", "<pad>", "<s>", "<mask>"} | translator.codes.tokens
    # No trained model writes languages into its texts, or what its tokenizer cannot spell.
    unspelled = range(max(tokenizer.get_vocab().values()) + 1, network.config.output_size)
    banned = [[token] for token in (*tokenizer.convert_tokens_to_ids(sorted(translator.codes.tokens)), *unspelled)]
    arguments = {"num_beams": num_beams, "max_new_tokens": 17, "bad_words_ids": banned or None}
    found = translator.translate(ENGLISH, return_alignment=True, **arguments, **languages)
    plan = translator.encode(ENGLISH, **languages).plan
    assert [one.text for one in found] == translator.translate(ENGLISH, **arguments, **languages)
    for segment, one in zip(plan.segments, found, strict=True):
        tokens = _generated(translator, segment, one.text, **arguments, **languages)
        reader = network.alignment_reader()
        start = torch.tensor([[network.config.decoder_start_token_id, *tokens[:-1]]])
        with torch.no_grad(), reader.reading():
            network(torch.tensor([segment.ids]), start)
        weights = reader.take()[0]
        if "src_lang" in languages:
            weights[0] = 0  # nobody chose the language's token
        vocabulary = {number: piece for piece, number in tokenizer.get_vocab().items()}
        source, source_places = _words([vocabulary[number] for number in segment.ids], special)
        target, target_places = _words(tokenizer.convert_ids_to_tokens(tokens), special | {"<unk>"})
        assert one.alignment.source == source
        assert one.alignment.target == target
        assert "".join(target) == one.text.replace(" ", "")
        assert "".join(source) == segment.text.replace(" ", "").partition("<<")[2 if "<<" in segment.text else 0]
        for row, pieces in enumerate(target_places):
            for column, sources in enumerate(source_places):
                expected = weights[pieces][:, sources].sum(dim=1).mean().item()
                assert one.alignment.weights[row, column] == pytest.approx(expected, rel=1e-3, abs=1e-5)


def _generated(translator, segment, text, **arguments):
    """The tokens of a translation: decoded once more, by the loops themselves."""
    network = translator.network
    ids = torch.tensor([segment.ids])
    with torch.no_grad():
        contexts = network.project_context(network.encode(ids))
    settings = translator.settings.updated(
        **{name: arguments[name] for name in ("num_beams", "max_new_tokens", "bad_words_ids")}
    )
    prompt = [network.config.decoder_start_token_id]
    if "src_lang" in arguments:
        prompt.append(translator.codes.target_token(arguments["tgt_lang"]))
    state = network.start(contexts, max_length=settings.total_length(1))
    tokens = decode(state, torch.tensor([prompt]), settings, num_forced=len(prompt) - 1)[0][0].tokens
    assert translator.tokenizer.decode(tokens, skip_special_tokens=True).strip() == text
    return tokens


def test_words_that_the_vocabulary_lacks_are_words(translators):
    found = translators["marian"].translate("The Ω cat sees", return_alignment=True, max_new_tokens=7).alignment
    assert found.source == ["The", "<unk>", "cat", "sees"]


def test_alignments_of_lines_and_parts_are_joined(translators):
    translator = translators["marian"]
    parts = translator.translate(ENGLISH[:2], return_alignment=True, max_new_tokens=11)
    whole = translator.translate("\n\n".join(ENGLISH[:2]), return_alignment=True, max_new_tokens=11).alignment
    assert whole.source == parts[0].alignment.source + parts[1].alignment.source
    assert whole.target == parts[0].alignment.target + parts[1].alignment.target
    rows, columns = parts[0].alignment.weights.shape
    np.testing.assert_allclose(whole.weights[:rows, :columns], parts[0].alignment.weights, atol=1e-5)
    np.testing.assert_allclose(whole.weights[rows:, columns:], parts[1].alignment.weights, atol=1e-5)
    assert not whole.weights[:rows, columns:].any()
    assert not whole.weights[rows:, :columns].any()
