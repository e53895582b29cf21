"""Texts that go with pictures: which belongs to which, and results in the shape in which the texts were given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar

from mmattn.errors import UsageError

ResultT = TypeVar("ResultT")


def check_unicode(text: str, name: str) -> None:
    """Raise `UsageError` for halves of surrogate pairs, which no tokenizer takes: they come of cut JSON escapes, and of
    bytes on the command line that are not UTF-8."""
    if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise UsageError(f"{name} holds half of a surrogate pair, which is no character: {text[:40]!r}")


class Scored(NamedTuple):
    """A generated text and its score: log-probability, with beam search divided by `length ** length_penalty`."""

    text: str
    score: float


class MatchResult(NamedTuple):
    """How well a text fits a picture: the matching head's probability, and the cosine of the embeddings."""

    probability: float
    cosine: float


@dataclass(frozen=True)
class Pairing:
    """Texts by picture, and how the caller had them.

    Attributes:
        texts: for each picture its texts.
        shape: "one" text on one picture, one text "each", "all" on the only picture, or "nested" lists.
    """

    texts: list[list[str]]
    shape: Literal["one", "each", "all", "nested"]

    def restore(self, results: list[list[ResultT]]) -> Any:
        """Results by picture and text, brought into the caller's shape."""
        if self.shape == "one":
            return results[0][0]
        if self.shape == "each":
            return [of_picture[0] for of_picture in results]
        return results[0] if self.shape == "all" else results


def pair_texts(texts: str | Sequence[Any], num_pictures: int, *, is_single: bool, name: str) -> Pairing:
    """Find out which texts belong to which pictures.

    One text goes with every picture. A list of texts goes one to a picture, or all to the only picture. A list of lists
    has a list for each picture.

    Args:
        texts: as the caller gave them.
        num_pictures: how many pictures there are.
        is_single: the picture was not given in a list.
        name: what the texts are called in errors: "questions".

    Raises:
        UsageError: as many texts as cannot be shared out, an empty list, or something that is no text.
    """
    flat = [texts] if isinstance(texts, str) else texts if isinstance(texts, list | tuple) else ()
    for text in (each for item in flat for each in (item if isinstance(item, list | tuple) else (item,))):
        if isinstance(text, str):
            check_unicode(text, f"one of the {name}")
    if isinstance(texts, str):
        return Pairing([[texts]] * num_pictures, "one" if is_single else "each")
    if not isinstance(texts, list | tuple) or not texts:
        raise UsageError(f"{name} must be a text, a list of texts or a list of such lists, not {texts!r}")
    if all(isinstance(text, str) for text in texts):
        if num_pictures == 1:
            return Pairing([list(texts)], "all")
        if len(texts) == num_pictures:
            return Pairing([[text] for text in texts], "each")
        raise UsageError(
            f"{len(texts)} {name} for {num_pictures} pictures: give one, one for each picture, "
            "or a list of lists with the texts of each picture"
        )
    nested = [list(of_picture) for of_picture in texts if isinstance(of_picture, list | tuple)]
    if len(nested) != len(texts) or not all(isinstance(text, str) for of_picture in nested for text in of_picture):
        raise UsageError(f"{name} mixes texts and other things: give texts only, or only lists of texts")
    if len(nested) != num_pictures:
        raise UsageError(f"{len(nested)} lists of {name} for {num_pictures} pictures: give a list for each picture")
    return Pairing(nested, "nested")


def groups_of_equal_count(counts: Sequence[int]) -> dict[int, list[int]]:
    """Pictures that have equally many texts, by that number; pictures without any are left out."""
    groups: dict[int, list[int]] = {}
    for picture, count in enumerate(counts):
        if count:
            groups.setdefault(count, []).append(picture)
    return groups
