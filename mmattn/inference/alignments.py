"""Word alignments: which source words a translated word was made from, as the decoder's cross-attention saw it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mmattn.maps.alignment import Alignment

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
    source, source_of = _words(source_pieces, special - {unknown})
    target, target_of = _words(target_pieces, special if unknown is None else special | {unknown})
    to_source = np.zeros((len(source_pieces), len(source)), dtype=np.float32)
    for token, word in enumerate(source_of):
        if word is not None:
            to_source[token, word] = 1.0
    to_target = np.zeros((len(target), len(target_pieces)), dtype=np.float32)
    for token, word in enumerate(target_of):
        if word is not None:
            to_target[word, token] = 1.0
    counts = np.maximum(to_target.sum(axis=1, keepdims=True), 1.0)
    return Alignment(source, target, (to_target / counts) @ weights.astype(np.float32) @ to_source)


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


def _words(pieces: Sequence[str], special: frozenset[str]) -> tuple[list[str], list[int | None]]:
    """The words that pieces spell, and the word of each piece."""
    words: list[str] = []
    of_piece: list[int | None] = []
    is_open = False
    for piece in pieces:
        if piece in special or not piece:
            of_piece.append(None)
            continue
        if piece.startswith(_SPACE) or not is_open:
            words.append("")
            is_open = True
        words[-1] += piece.removeprefix(_SPACE)
        of_piece.append(len(words) - 1)
    # A lone space piece starts a word whose letters follow; one that stays empty is no word.
    keep = [number for number, word in enumerate(words) if word]
    renumbered = {number: place for place, number in enumerate(keep)}
    return [words[number] for number in keep], [None if of is None else renumbered.get(of) for of in of_piece]
