"""Words of a text and the tokens that spell them, for any tokenizer."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from mmattn.errors import UsageError

_WORD_STARTS = ("\u2581", "\u0120")  # what sentencepiece and byte-level tokenizers put before a word
_WORD_END = "</w>"  # what CLIP's puts behind one
_CONTINUES = "##"  # what BERT's puts before the later pieces of one
_UNBOUNDED = 100_000  # tokenizers without a limit say a very large one
_SHOWN = 40  # words that an error lists


@dataclass(frozen=True)
class TextTokens:
    """A text cut into tokens.

    Attributes:
        text: the text; of tokens that a model wrote, what they spell.
        ids: the tokens, special ones included.
        pieces: what each token spells, without marks and spaces; "" for special tokens.
        starts: whether a token begins a word.
    """

    text: str
    ids: tuple[int, ...]
    pieces: tuple[str, ...]
    starts: tuple[bool, ...]

    def __len__(self) -> int:
        return len(self.ids)

    def find(self, word: str) -> list[list[int]]:
        """Every place of a word or phrase: the positions of its tokens, case and spaces aside."""
        return find_pieces(self.pieces, word, self.starts)

    def positions(self, word: str, occurrence: int | None = None) -> list[int]:
        """The positions of a word's tokens: of all its places, or of one, counted from 0.

        Raises:
            UsageError: the word is not there, or not so often; the message says which words are.
        """
        found = self.find(word)
        if not found or (occurrence is not None and not 0 <= occurrence < len(found)):
            times = "not" if not found else "only once" if len(found) == 1 else f"only {len(found)} times"
            raise UsageError(f"{word!r} is {times} in {self.text!r}; its words are {self._listed_words()}")
        return sorted({place for run in found for place in run}) if occurrence is None else found[occurrence]

    def words(self) -> list[tuple[str, list[int]]]:
        """Every word in order, with the positions of its tokens; special tokens belong to none."""
        words: list[tuple[str, list[int]]] = []
        is_open = False
        for place, (piece, is_start) in enumerate(zip(self.pieces, self.starts, strict=True)):
            if not piece:
                # A lone space mark begins the word that follows it.
                is_open = False
                continue
            if is_start or not is_open:
                words.append(("", []))
            words[-1] = (words[-1][0] + piece, [*words[-1][1], place])
            is_open = True
        return words

    def _listed_words(self) -> str:
        words = list(dict.fromkeys(word for word, _ in self.words()))
        more = f" and {len(words) - _SHOWN} more" if len(words) > _SHOWN else ""
        return ", ".join(map(repr, words[:_SHOWN])) + more if words else "none"


def text_tokens(tokenizer: Any, text: str, *, max_length: int | None = None) -> TextTokens:
    """A text as a model's text encoder gets it: with special tokens, cut at the tokenizer's limit, not padded.

    Args:
        tokenizer: of transformers.
        text: a prompt.
        max_length: tokens at most; None: the tokenizer's own limit.
    """
    limit = tokenizer.model_max_length if max_length is None else max_length
    cut = {"truncation": True, "max_length": limit} if limit < _UNBOUNDED else {}
    return tokens_of_ids(tokenizer, tokenizer(text, **cut).input_ids, text=text)


def tokens_of_ids(tokenizer: Any, ids: Sequence[int], *, special: Sequence[int] = (), text: str = "") -> TextTokens:
    """Tokens that a model read or wrote, as a text.

    Args:
        tokenizer: of transformers.
        ids: the tokens.
        special: tokens that stand for no text besides those that the tokenizer calls special.
        text: what they spell; "": the pieces with spaces between words.
    """
    hidden = {*tokenizer.all_special_ids, *special}
    # Embeddings may have more rows than the vocabulary has entries: tokens without a spelling.
    marked = [str(token or "") for token in tokenizer.convert_ids_to_tokens(list(ids))]
    pieces = [
        "" if number in hidden else _spelling(tokenizer, number, token)
        for number, token in zip(ids, marked, strict=True)
    ]
    starts = _word_starts(marked, pieces)
    made = TextTokens(text, tuple(ids), tuple(pieces), tuple(starts))
    return made if text else TextTokens(" ".join(word for word, _ in made.words()), made.ids, made.pieces, made.starts)


def marked_tokens(marked: Sequence[str], special: Collection[str]) -> TextTokens:
    """Pieces of a sentencepiece vocabulary, "" or special ones for tokens that stand for no text."""
    pieces = ["" if piece in special else piece.strip(_WORD_STARTS[0]) for piece in marked]
    made = TextTokens("", tuple(range(len(marked))), tuple(pieces), tuple(_word_starts(marked, pieces)))
    return TextTokens(" ".join(word for word, _ in made.words()), made.ids, made.pieces, made.starts)


def shifted_tokens(text: TextTokens, count: int) -> TextTokens:
    """The same text behind so many other tokens, which stand for nothing."""
    none = (0,) * count
    return TextTokens(text.text, none + text.ids, ("",) * count + text.pieces, (True,) * count + text.starts)


def numbered_tokens(ids: Sequence[int]) -> TextTokens:
    """Tokens of a model whose tokenizer is not known: each is a word that is called by its number."""
    pieces = tuple(str(number) for number in ids)
    return TextTokens(" ".join(pieces), tuple(ids), pieces, (True,) * len(pieces))


def find_pieces(pieces: Sequence[str], word: str, starts: Sequence[bool] | None = None) -> list[list[int]]:
    """Runs of tokens that spell a word or phrase, spaces and case aside.

    Args:
        pieces: what each token spells; "" for special tokens.
        word: what to look for.
        starts: which tokens begin a word: a run begins with one and ends before one. None: not known.
    """
    wanted = "".join(word.lower().split())
    runs = []
    for first in range(len(pieces)):
        if starts is not None and not starts[first]:
            continue
        spelled = ""
        for last in range(first, len(pieces)):
            spelled += pieces[last].lower()
            if not pieces[last] or not wanted.startswith(spelled):
                break
            if spelled == wanted:
                if starts is None or last + 1 == len(pieces) or starts[last + 1] or not pieces[last + 1]:
                    runs.append(list(range(first, last + 1)))
                break
    return runs


def _spelling(tokenizer: Any, number: int, token: str) -> str:
    if token.startswith(_WORD_STARTS[0]):
        return token.strip(_WORD_STARTS[0])
    return str(tokenizer.decode([number])).strip().removeprefix(_CONTINUES)


def _word_starts(marked: Sequence[str], pieces: Sequence[str]) -> list[bool]:
    """Which tokens begin a word, by whichever marks the tokenizer uses; punctuation is a word of its own."""
    marks_starts = any(token.startswith(_WORD_STARTS) for token in marked)
    marks_ends = any(token.endswith(_WORD_END) for token in marked)
    starts: list[bool] = []
    for place, (token, piece) in enumerate(zip(marked, pieces, strict=True)):
        before = marked[place - 1] if place else ""
        is_first = place == 0 or not pieces[place - 1]
        is_mark = bool(piece) and not any(letter.isalnum() for letter in piece)
        after_mark = bool(place and pieces[place - 1]) and not any(letter.isalnum() for letter in pieces[place - 1])
        if marks_starts:
            is_start = token.startswith(_WORD_STARTS)
            # A lone mark begins the word that follows it.
            is_start = is_start or before in _WORD_STARTS
        elif marks_ends:
            is_start = before.endswith(_WORD_END)
        else:
            is_start = not token.startswith(_CONTINUES)
        starts.append(is_first or is_start or is_mark or after_mark)
    return starts
