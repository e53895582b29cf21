"""Words of a text and the tokens that spell them, for any tokenizer."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from mmattn.errors import UsageError

_WORD_STARTS = ("\u2581", "\u0120")  # what sentencepiece and byte-level tokenizers put before a word
_WORD_END = "</w>"  # what CLIP's puts behind one
_CONTINUES = "##"  # what BERT's puts before the later pieces of one
SPACE = " "  # spelled by a token that holds nothing but the mark of a word's beginning
REST = "\ufffd"  # spelled by a token that holds the rest of a letter, whose beginning the token before it holds
_MOST_SHARING = 12  # tokens that may share letters
_UNBOUNDED = 100_000  # tokenizers without a limit say a very large one
_SHOWN = 40  # words that an error lists


@dataclass(frozen=True)
class TextTokens:
    """A text cut into tokens.

    Attributes:
        text: the text; of tokens that a model wrote, what they spell.
        ids: the tokens, special ones included.
        pieces: what each token spells, without marks and spaces; "" for special tokens, `SPACE` for a mark by itself.
            Of tokens that hold bytes of one letter the first spells it, the others `REST`.
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
            UsageError: the word is not there, or not so often; the message says which words are, and what was cut off.
        """
        found = self.find(word)
        if not found or (occurrence is not None and not 0 <= occurrence < len(found)):
            times = "not" if not found else "only once" if len(found) == 1 else f"only {len(found)} times"
            raise UsageError(
                f"{word!r} is {times} in {self.text!r}; its words are {self._listed_words()}{self._cut(word)}"
            )
        return sorted({place for run in found for place in run}) if occurrence is None else found[occurrence]

    def words(self) -> list[tuple[str, list[int]]]:
        """Every word in order, with the positions of its tokens; special tokens belong to none."""
        words: list[tuple[str, list[int]]] = []
        is_open = False
        for place, (piece, is_start) in enumerate(zip(self.pieces, self.starts, strict=True)):
            if piece in ("", SPACE):
                is_open = False
                continue
            if is_start or not is_open:
                words.append(("", []))
            words[-1] = (words[-1][0] + _spelled(piece), [*words[-1][1], place])
            is_open = True
        return words

    def _cut(self, word: str) -> str:
        """A hint where a word stands behind the last token."""
        unseen = "".join(self.text.lower().split())[len("".join(map(_spelled, self.pieces))) :]
        is_there = "".join(word.lower().split()) in unseen
        return f" (the text encoder takes {len(self)} tokens, the rest was cut off)" if is_there else ""

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


def prompt_tokens(pipeline: Any, tokenizer: Any, prompt: str, *, max_length: int | None = None) -> TextTokens:
    """A prompt as a pipeline gives it to the text encoder of one of its tokenizers; see `text_tokens`.

    Args:
        pipeline: of diffusers; None: the prompt is given as it is.
        tokenizer: of transformers.
        prompt: the text.
        max_length: tokens of the padded text, where they are fewer than the tokenizer's own limit; None: not known.
    """
    # Textual inversion writes a word of several vectors as several words.
    convert = getattr(pipeline, "maybe_convert_prompt", None)
    converted = prompt if convert is None else convert(prompt, tokenizer)
    limit = int(tokenizer.model_max_length)
    limit = limit if max_length is None else min(limit, max_length)
    found = text_tokens(tokenizer, converted, max_length=limit)
    is_behind = max_length is not None and getattr(tokenizer, "padding_side", "right") == "left"  # of its padding
    return shifted_tokens(found, max(0, limit - len(found))) if is_behind else found


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
    _join_letters(tokenizer, ids, pieces)
    added = getattr(tokenizer, "added_tokens_decoder", {})
    starts = _word_starts(marked, pieces, [number in added for number in ids])
    made = TextTokens(text, tuple(ids), tuple(pieces), tuple(starts))
    return made if text else TextTokens(" ".join(word for word, _ in made.words()), made.ids, made.pieces, made.starts)


def marked_tokens(marked: Sequence[str], special: Collection[str]) -> TextTokens:
    """Pieces of a sentencepiece vocabulary, "" or special ones for tokens that stand for no text."""
    pieces = ["" if piece in special else piece.strip(_WORD_STARTS[0]) or _lone(piece) for piece in marked]
    starts = _word_starts(marked, pieces, [False] * len(marked))
    made = TextTokens("", tuple(range(len(marked))), tuple(pieces), tuple(starts))
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
        if not _spelled(pieces[first]) or (starts is not None and not starts[first]):
            continue
        spelled = ""
        for last in range(first, len(pieces)):
            spelled += _spelled(pieces[last]).lower()
            if not pieces[last] or not wanted.startswith(spelled):
                break
            following = pieces[last + 1] if last + 1 < len(pieces) else ""
            if spelled == wanted and following != REST:
                if starts is None or not following or starts[last + 1]:
                    runs.append([place for place in range(first, last + 1) if pieces[place] != SPACE])
                break
    return runs


def _spelled(piece: str) -> str:
    return "" if piece in (REST, SPACE) else piece


def _join_letters(tokenizer: Any, ids: Sequence[int], pieces: list[str]) -> None:
    """Let the first of the tokens that hold bytes of one letter spell it: by themselves they decode to nothing that
    could be read."""
    end = 0
    for first, piece in enumerate(pieces):
        if first < end or REST not in piece:
            continue
        for last in range(first + 1, min(len(pieces), first + _MOST_SHARING)):
            if not pieces[last]:
                break
            letters = str(tokenizer.decode(list(ids[first : last + 1]))).strip()
            if REST not in letters:
                end = last + 1
                pieces[first:end] = [letters, *[REST] * (last - first)]
                break


def _spelling(tokenizer: Any, number: int, token: str) -> str:
    if token.startswith(_WORD_STARTS[0]):
        return token.strip(_WORD_STARTS[0]) or _lone(token)
    return str(tokenizer.decode([number])).strip().removeprefix(_CONTINUES) or _lone(token)


def _lone(token: str) -> str:
    return SPACE if token in _WORD_STARTS else ""


def _word_starts(marked: Sequence[str], pieces: Sequence[str], added: Sequence[bool]) -> list[bool]:
    """Which tokens begin a word, by whichever marks the tokenizer uses; punctuation is a word of its own, and so are
    tokens that were added to the vocabulary, which have no marks."""
    marks_starts = any(token.startswith(_WORD_STARTS) for token in marked)
    marks_ends = any(token.endswith(_WORD_END) for token in marked)
    starts: list[bool] = []
    spelled = ""  # by the token before, or by that whose letter it ends
    for place, (token, piece) in enumerate(zip(marked, pieces, strict=True)):
        before = marked[place - 1] if place else ""
        if piece == REST and spelled:
            starts.append(False)
            continue
        is_mark = _is_mark(piece)
        if marks_starts:
            is_start = token.startswith(_WORD_STARTS)
            # A lone mark begins the word that follows it.
            is_start = is_start or before in _WORD_STARTS
        elif marks_ends:
            is_start = before.endswith(_WORD_END)
        else:
            is_start = not token.startswith(_CONTINUES)
        is_added = added[place] or (place > 0 and added[place - 1])
        starts.append(not spelled or is_start or is_added or is_mark or _is_mark(spelled))
        spelled = piece
    return starts


def _is_mark(piece: str) -> bool:
    return bool(piece) and not any(letter.isalnum() for letter in piece)
