"""Texts cut into what is translated at once: a line each, or parts of a line that is too long for the model."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass

from mmattn.errors import UsageError

# After a sentence's end mark, with closing quotes (of any language) and brackets, where white space follows; after an
# ideographic one.
_SENTENCE_END = re.compile(r"(?:(?<=[.!?…])|(?<=[.!?…][\"'”“’»«)\]]))\s+|(?<=[。！？])")


@dataclass(frozen=True)
class Segment:
    """One input of the model.

    Attributes:
        text: what is translated.
        ids: its tokens.
        src_lang, tgt_lang: its languages, where the model has several.
    """

    text: str
    ids: list[int]
    src_lang: str | None
    tgt_lang: str | None


@dataclass(frozen=True)
class Document:
    """A text given by the caller.

    Attributes:
        lines: for each of its lines the numbers of its segments, none for a blank line.
    """

    lines: list[list[int]]

    @property
    def segments(self) -> list[int]:
        """Numbers of all segments, in order."""
        return [number for line in self.lines for number in line]


def split_line(line: str, count_tokens: Callable[[str], int], limit: int, *, may_split: bool, place: str) -> list[str]:
    """A line as it is when it fits the model, else as few parts as its sentence ends allow.

    Args:
        line: text without line breaks.
        count_tokens: how many tokens a text becomes.
        limit: most tokens of a part.
        may_split: False refuses a line that does not fit.
        place: which line it is, for messages.

    Raises:
        UsageError: a line that may not be split, or a sentence that is too long by itself.
    """
    count = count_tokens(line)
    if count <= limit:
        return [line]
    if not may_split:
        raise UsageError(
            f"{place} has {count} tokens, this model takes {limit}: shorten it, or let it be split at its sentence ends"
            " (on_long='split')"
        )
    cuts = [0, *(found.end() for found in _SENTENCE_END.finditer(line)), len(line)]
    parts: list[str] = []
    first = 0  # where the last part begins
    for start, end in itertools.pairwise(cuts):
        sentence, joined = line[start:end].strip(), line[first:end].strip()
        if not sentence:
            continue
        if parts and count_tokens(joined) <= limit:
            parts[-1] = joined
            continue
        count = count_tokens(sentence)
        if count > limit:
            raise UsageError(
                f"{place} holds a sentence of {count} tokens, this model takes {limit}: cut it ({sentence[:40]!r}...)"
            )
        parts.append(sentence)
        first = start
    return parts
