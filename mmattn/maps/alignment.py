"""Which words of a source the words of a text come from: pairs, and a picture of the matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from mmattn.maps.draw import FONT_SIZE, MARGIN, draw_legend, load_font, viridis
from mmattn.maps.tokens import TextTokens

Word = tuple[str, list[int]]
"""A word and its tokens."""

_CELL = 28
_LEAST_CELL, _MOST_PIXELS = 3, 1600


@dataclass(frozen=True, eq=False)
class Alignment:
    """Attention from the words of a translation to the words of its source.

    Attributes:
        source: words of the source, Ls.
        target: words of the translation, Lt.
        weights: float32 `[Lt, Ls]`. Tokens of a source word are added up, tokens of a target word averaged; rows sum to
            1 less what went to special tokens.
    """

    source: list[str]
    target: list[str]
    weights: np.ndarray

    def pairs(self) -> list[tuple[int, int]]:
        """For each target word its strongest source word: (source word, target word), numbers counted from 0."""
        if not self.source:
            return []
        return [(int(row.argmax()), target) for target, row in enumerate(self.weights)]

    def words(self) -> list[tuple[str, str]]:
        """`pairs` as (source word, target word)."""
        return [(self.source[source], self.target[target]) for source, target in self.pairs()]

    def draw(self) -> Image.Image:
        """The matrix, a row for each target word and a column for each source word, the strongest of a row framed."""
        rows, columns = len(self.target), len(self.source)
        cell = max(_LEAST_CELL, min(_CELL, _MOST_PIXELS // max(1, columns)))
        font = load_font(FONT_SIZE)
        left = MARGIN + max((int(font.getlength(word)) for word in self.target), default=0) + 8
        has_heads = cell > FONT_SIZE  # narrower columns have no room for words
        above = MARGIN + (max((int(font.getlength(word)) for word in self.source), default=0) + 8 if has_heads else 0)
        height = max(cell, FONT_SIZE + 4)
        size = (max(left + columns * cell + MARGIN, 360), above + rows * height + 3 * MARGIN + FONT_SIZE)
        canvas = Image.new("RGB", size, "white")
        pen = ImageDraw.Draw(canvas)
        if self.weights.size:
            share = self.weights / max(float(self.weights.max()), 1e-12)
            colours = Image.fromarray(viridis(share)).resize((columns * cell, rows * height), Image.Resampling.NEAREST)
            canvas.paste(colours, (left, above))
        for number, word in enumerate(self.target):
            pen.text((left - 8 - font.getlength(word), above + number * height + 2), word, fill="black", font=font)
        for number, word in enumerate(self.source if has_heads else ()):
            label = Image.new("RGB", (int(font.getlength(word)) + 2, FONT_SIZE + 6), "white")
            ImageDraw.Draw(label).text((0, 0), word, fill="black", font=font)
            turned = label.rotate(90, expand=True)
            canvas.paste(turned, (left + number * cell + (cell - turned.width) // 2, above - 4 - turned.height))
        for source, target in self.pairs():
            x, y = left + source * cell, above + target * height
            pen.rectangle((x, y, x + cell - 1, y + height - 1), outline="black", width=2)
            pen.rectangle((x + 2, y + 2, x + cell - 3, y + height - 3), outline="white")
        draw_legend(canvas, above + rows * height + MARGIN)
        return canvas

    def save(self, path: str | Path) -> None:
        """Write the drawing; the ending says the format."""
        self.draw().save(path)


def word_alignment(
    target: TextTokens, source: TextTokens | None, weights: np.ndarray, *, is_shifted: bool
) -> Alignment:
    """Token weights `[L, Lk]` as words.

    Args:
        target: L tokens, whose queries the rows are.
        source: Lk tokens or fewer (the rest is padding); None: what was attended to has no words, and is numbered.
        weights: rows sum to 1.
        is_shifted: the query of a token chose the one after it, so that a word is spoken for by the queries before.
    """
    words = []
    for word, places in target.words():
        queries = [place - 1 for place in places] if is_shifted else places
        queries = [place for place in queries if 0 <= place < len(weights)]
        if queries:
            words.append((word, queries))
    if source is None:
        numbered = [(str(number), [number]) for number in range(weights.shape[1])]
        return alignment_of(words, numbered, weights)
    return alignment_of(words, source.words(), weights)


def alignment_of(target: Sequence[Word], source: Sequence[Word], weights: np.ndarray) -> Alignment:
    """Token weights as words: queries of a target word averaged, tokens of a source word added up.

    Args:
        target: words and their rows in the weights.
        source: words and their columns.
        weights: `[queries, tokens]`.
    """
    table = np.zeros((len(target), weights.shape[1]), dtype=np.float32)
    for number, (_, rows) in enumerate(target):
        table[number] = weights[rows].mean(axis=0)
    summed = np.zeros((len(target), len(source)), dtype=np.float32)
    for number, (_, columns) in enumerate(source):
        summed[:, number] = table[:, columns].sum(axis=1)
    return Alignment([word for word, _ in source], [word for word, _ in target], summed)
