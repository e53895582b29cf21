"""Word alignments: which source words a translated word was made from, as the decoder's cross-attention saw it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mmattn.maps.alignment import Alignment, Word, alignment_of

__all__ = ["Alignment", "align_words", "join_alignments"]

_SPACE = "\u2581"  # what sentencepiece puts before a word


def align_words(
    source_pieces: Sequence[str],
    target_pieces: Sequence[str],
    weights: np.ndarray,
    special: frozenset[str],
    *,
    unknown: str | None = None,
) -> Alignment:
    """Token weights `[Lt tokens, Ls tokens]` to words, special tokens left out.

    Args:
        source_pieces: sentencepiece pieces of the source.
        target_pieces: of the translation, "" for a token without a spelling.
        weights: attention of each target token.
        special: tokens that belong to no word: end, padding, language codes.
        unknown: what stands for a word that the vocabulary lacks. The source has that word; a translation's text leaves
            it out.
    """
    source = _words(source_pieces, special - {unknown})
    target = _words(target_pieces, special if unknown is None else special | {unknown})
    return alignment_of(target, source, weights)


def join_alignments(parts: Sequence[Alignment]) -> Alignment:
    """The alignment of a text of several segments, each of which looked at itself only."""
    source = [word for part in parts for word in part.source]
    target = [word for part in parts for word in part.target]
    weights = np.zeros((len(target), len(source)), dtype=np.float32)
    row = column = 0
    for part in parts:
        rows, columns = part.weights.shape
        weights[row : row + rows, column : column + columns] = part.weights
        row, column = row + rows, column + columns
    return Alignment(source, target, weights)


def _words(pieces: Sequence[str], special: frozenset[str]) -> list[Word]:
    """The words that pieces spell, with the numbers of their pieces."""
    words: list[Word] = []
    is_open = False
    for number, piece in enumerate(pieces):
        if piece in special or not piece:
            continue
        if piece.startswith(_SPACE) or not is_open:
            words.append(("", []))
            is_open = True
        words[-1] = (words[-1][0] + piece.removeprefix(_SPACE), [*words[-1][1], number])
    # A lone space piece starts a word whose letters follow; one that stays empty is no word.
    return [word for word in words if word[0]]
