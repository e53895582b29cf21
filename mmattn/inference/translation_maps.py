"""Finished translations handed to the recorders of a translator: each is read once more for them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mmattn.errors import UsageError
from mmattn.inference.alignments import Alignment, align_words
from mmattn.inference.decode import Generated
from mmattn.inference.segments import Segment
from mmattn.inference.sources import EncodedBatch
from mmattn.maps.record import AttentionMaps, recorders_of
from mmattn.maps.recordings import RecordedPair
from mmattn.maps.tokens import marked_tokens
from mmattn.models.translator import TranslatorNetwork

if TYPE_CHECKING:
    from mmattn.inference.translator import Translator

Recordings = dict[int, list[RecordedPair]]
"""Segment number to what each recorder has kept of its translation."""


def translation_recorder(translator: Translator, *, window: int | None, stream: bool) -> TranslationRecorder | None:
    """What reads a translator's texts once more for the recorders that wait for them; None where none does.

    Raises:
        UsageError: a call that cannot be recorded.
    """
    recorders = recorders_of(translator)
    if not recorders:
        return None
    for name, is_given in (("stream", stream), ("window", window is not None)):
        if is_given:
            raise UsageError(f"record_attention: a translation with {name}= cannot be recorded; leave {name} out")
    tokenizer: Any = translator.tokenizer
    special = frozenset(tokenizer.all_special_tokens) | translator.codes.tokens
    return TranslationRecorder(translator.network, translator.start_id, recorders, special, tokenizer.unk_token)


class TranslationRecorder:
    """Reads translations for the recorders that wait for them.

    Args:
        network: the translator's.
        start_id: the token that its translations start from.
        recorders: they get the recordings at the end, in the order of the segments.
        special: tokens that belong to no word.
        unknown: what stands for a word that the vocabulary lacks.
    """

    def __init__(
        self,
        network: TranslatorNetwork,
        start_id: int,
        recorders: Sequence[AttentionMaps],
        special: frozenset[str],
        unknown: str | None,
    ) -> None:
        self._network, self._start_id, self._recorders = network, start_id, recorders
        self._special, self._unknown = special, unknown
        self._kept: Recordings = {}

    def add(
        self, segment: Segment, number: int, row: int, batch: EncodedBatch, best: Generated, pieces: Sequence[list[str]]
    ) -> None:
        """Read one translation.

        Args:
            segment: what was translated.
            number: its number in the plan.
            row: its row in the batch.
            batch: the encoded sources.
            best: the translation.
            pieces: those of the source and of the translation.
        """
        network, config = self._network, self._network.config
        source, target = pieces
        device = next(network.parameters()).device
        ids = torch.tensor([[self._start_id, *best.tokens[:-1]]], device=device)
        length = len(segment.ids)
        contexts = tuple(
            None if each is None else each.select(torch.tensor([row], device=device)) for each in batch.contexts
        )
        align = functools.partial(_align, source, target, length, self._special, self._unknown)
        spot = network.decoder.layers[config.chosen_alignment_layer].cross_attn, config.alignment_heads
        hidden = self._special | {""}
        self._kept[number] = [
            recorder.pair(
                marked_tokens(target, hidden),
                marked_tokens(source, hidden),
                lambda: network.decoder(ids, contexts),
                align=align if recorder.role == "cross" else None,
                best=spot,
            )
            for recorder in self._recorders
        ]

    def finish(self) -> None:
        """Hand everything over."""
        for number in sorted(self._kept):
            for recorder, recording in zip(self._recorders, self._kept[number], strict=True):
                recorder.texts.append(recording)


def _align(
    source: list[str], target: list[str], length: int, special: frozenset[str], unknown: str | None, weights: np.ndarray
) -> Alignment:
    return align_words(source, target, weights[:, :length], special, unknown=unknown)
