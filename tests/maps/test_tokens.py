"""Words and the tokens that spell them."""

from __future__ import annotations

import pytest

from mmattn.errors import UsageError
from mmattn.maps.tokens import TextTokens, find_pieces, marked_tokens, numbered_tokens, text_tokens, tokens_of_ids
from tests.inference.tiny_pipelines import _tokenizer


class Vocabulary:
    """A tokenizer with any pieces."""

    def __init__(self, *pieces: str) -> None:
        self.pieces, self.model_max_length = pieces, 5
        self.all_special_ids = [number for number, piece in enumerate(pieces) if piece.startswith("<")]

    def convert_ids_to_tokens(self, ids):
        return [self.pieces[number] for number in ids]

    def decode(self, ids):
        return self.pieces[ids[0]].replace("</w>", " ").replace("\u0120", " ")


@pytest.mark.parametrize(
    "pieces",
    [
        ["<s>", "a</w>", "car", "pet</w>", "on</w>", "a</w>", "car</w>", ".</w>", "<e>"],
        ["<s>", "\u2581a", "\u2581car", "pet", "\u2581on", "\u2581a", "\u2581", "car", ".", "<e>"],
        ["<s>", "\u0120a", "\u0120car", "pet", "\u0120on", "\u0120a", "\u0120car", ".", "<e>"],
        ["<s>", "a", "car", "##pet", "on", "a", "car", ".", "<e>"],
    ],
    ids=["clip", "sentencepiece", "bytes", "bert"],
)
def test_words_are_whole_in_every_kind_of_vocabulary(pieces):
    text = tokens_of_ids(Vocabulary(*pieces), range(len(pieces)))
    assert [word for word, _ in text.words()] == ["a", "carpet", "on", "a", "car", "."]
    last = len(pieces) - 3
    assert text.find("car") == [[last]], "not the beginning of carpet"
    assert text.positions("Carpet") == [2, 3]
    assert text.positions("a") == [1, 5]
    assert text.positions("a", 1) == [5]
    assert text.positions("a carpet on") == [1, 2, 3, 4]
    assert text.positions("on a car.") == [4, 5, last, last + 1]
    assert text.find("pet") == []


@pytest.mark.parametrize(
    "pieces",
    [
        ["<s>", "a</w>", "<cat>", "<cat>_1", "in</w>", ",</w>", "<e>"],
        ["<s>", "\u2581a", "<cat>", "<cat>_1", "\u2581in", ",", "<e>"],
        ["<s>", "a", "<cat>", "<cat>_1", "in", ",", "<e>"],
    ],
    ids=["clip", "sentencepiece", "bert"],
)
def test_tokens_that_were_added_to_a_vocabulary_are_words(pieces):
    vocabulary = Vocabulary(*pieces)
    vocabulary.all_special_ids, vocabulary.added_tokens_decoder = [0, 6], {0: "<s>", 2: "<cat>", 3: "<cat>_1"}
    text = tokens_of_ids(vocabulary, range(7))
    assert text.words() == [("a", [1]), ("<cat>", [2]), ("<cat>_1", [3]), ("in", [4]), (",", [5])]
    assert text.positions("<cat>") == [2]
    assert text.positions("<cat> <cat>_1 in") == [2, 3, 4]


class Bytes(Vocabulary):
    """Tokens that hold bytes of a text, of which some are no whole letters; a sign stands for each byte."""

    def decode(self, ids):
        signs = "".join(self.pieces[number] for number in ids).replace("</w>", " ")
        return signs.encode("latin1").decode(errors="replace")


def test_letters_of_several_tokens():
    hat, cat, sharp = (letter.encode().decode("latin1") for letter in ("\U0001f3a9", "\u732b", "\xdf"))
    pieces = [hat[:1], hat[1:3], hat[3:] + "</w>", "stra" + sharp[:1], sharp[1:], "e</w>", "on</w>"]
    pieces += [cat[:2], cat[2:] + cat[:1], cat[1:] + "</w>"]
    text = tokens_of_ids(Bytes(*pieces), range(len(pieces)))
    assert [word for word, _ in text.words()] == ["\U0001f3a9", "stra\xdfe", "on", "\u732b\u732b"]
    assert text.positions("\U0001f3a9") == [0, 1, 2]
    assert text.positions("Stra\xdfe on") == [3, 4, 5, 6]
    assert text.find("stra\xdf") == []
    assert text.find("\u732b\u732b") == [[7, 8, 9]]
    assert find_pieces(text.pieces, "\u732b\u732b") == [[7, 8, 9]]


def test_words_that_are_not_there_are_named_with_those_that_are():
    text = text_tokens(_tokenizer(), "a red circle below a star")
    assert text.ids[0] != text.ids[1]
    assert text.pieces[0] == ""
    with pytest.raises(UsageError, match=r"'cat' is not in 'a red .* its words are 'a', 'red', 'circle', 'below', 'st"):
        text.positions("cat")
    with pytest.raises(UsageError, match="'red' is only once in"):
        text.positions("red", 1)
    with pytest.raises(UsageError, match="'a' is only 2 times in"):
        text.positions("a", 2)


def test_text_is_cut_at_the_tokenizers_limit():
    tokenizer = _tokenizer()
    cut = text_tokens(tokenizer, "a " * 30 + "star", max_length=7)
    assert len(cut) == 7
    with pytest.raises(UsageError, match="'star' is not in .* 7 tokens, the rest was cut off"):
        cut.positions("star")
    assert len(text_tokens(tokenizer, "red circle")) == 4


def test_other_sources_of_tokens():
    assert numbered_tokens([5, 7]).positions("7") == [1]
    marked = marked_tokens(["\u2581Two", "\u2581d", "ogs", "</s>"], {"</s>"})
    assert marked.text == "Two dogs"
    assert marked.pieces == ("Two", "d", "ogs", "")
    assert find_pieces(["x", "y"], "XY") == [[0, 1]]
    assert TextTokens("", (), (), ()).words() == []
