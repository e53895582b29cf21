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
    assert text.find("pet") == []


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
    assert len(text_tokens(tokenizer, "a " * 30, max_length=7)) == 7
    assert len(text_tokens(tokenizer, "red circle")) == 4


def test_other_sources_of_tokens():
    assert numbered_tokens([5, 7]).positions("7") == [1]
    marked = marked_tokens(["\u2581Two", "\u2581d", "ogs", "</s>"], {"</s>"})
    assert marked.text == "Two dogs"
    assert marked.pieces == ("Two", "d", "ogs", "")
    assert find_pieces(["x", "y"], "XY") == [[0, 1]]
    assert TextTokens("", (), (), ()).words() == []
