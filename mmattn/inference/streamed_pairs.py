"""What a translator is trained on where its pairs are read from shards while training."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from mmattn.data.parallel import pair_builder
from mmattn.data.parallel_spec import FILTERS
from mmattn.data.sentence_pairs import SentencePair
from mmattn.data.stream_pairs import StreamedPairs, measure_pairs
from mmattn.data.translation_tokens import PairTokenizer
from mmattn.errors import ConfigError
from mmattn.inference.text_fingerprints import encoders_fingerprint


class StreamedTraining(NamedTuple):
    """The pairs, their token counts where those are needed, how many are left out, and how many have alignments."""

    source: StreamedPairs
    lengths: np.ndarray | None
    num_left_out: int
    num_aligned: int


def streamed_training(
    source: StreamedPairs, tokenizer: PairTokenizer, *, by_tokens: bool, refuse: bool, **limits: int
) -> StreamedTraining:
    """Fit streamed pairs to a model.

    With batches by tokens, all pairs are looked through and their tokens counted, once for all runs. Else nothing is
    looked through: pairs that are bad or too long are replaced when they come.

    Args:
        source: The pairs.
        tokenizer: The model's.
        by_tokens: Whether batches are made by tokens.
        refuse: Whether pairs that are too long are an error.
        limits: `max_source_length` and `max_target_length`.

    Raises:
        ConfigError: pairs that are to be left out, without batches by tokens.
        DataError: see `measure_pairs`.
    """
    spec = source.spec
    if by_tokens:
        builder = pair_builder(spec, source.name)
        measured = measure_pairs(source, builder, tokenizer, _fingerprint(tokenizer.tokenizer), refuse=refuse, **limits)
        return StreamedTraining(source, measured.lengths, measured.num_left_out, measured.num_aligned)
    filters = [name for name in FILTERS if getattr(spec, name) not in (None, False)]
    if filters:
        raise ConfigError(
            f"data.{filters[0]} with data.streaming=true needs training.batch_tokens, for which all pairs are looked "
            "through first: set it, or leave out such pairs beforehand"
        )
    if spec.columns.tgt_lang is not None and tokenizer.languages.kind == "none":
        raise ConfigError(
            "data.columns.tgt_lang: the tokenizer has no language tokens, so all pairs must have one target language"
        )
    if not refuse:
        source = source.checked(_Fits(tokenizer, (limits["max_source_length"], limits["max_target_length"])))
    return StreamedTraining(source, None, 0, len(source) if spec.columns.alignment is not None else 0)


class _Fits:
    """Which pairs are too long for a model. A token is a character at least, so that most need no second look."""

    def __init__(self, tokenizer: PairTokenizer, limits: tuple[int, int]) -> None:
        self.tokenizer, self.limits = tokenizer, limits

    def __call__(self, pairs: Sequence[SentencePair]) -> list[str | None]:
        unsure = [number for number, pair in enumerate(pairs) if not self._is_short(pair)]
        reasons: list[str | None] = [None] * len(pairs)
        rows = self.tokenizer([pairs[number] for number in unsure]) if unsure else []
        for number, row in zip(unsure, rows, strict=True):
            if any(length > limit for length, limit in zip(row.lengths, self.limits, strict=True)):
                reasons[number] = (
                    f"is too long: {row.lengths[0]} source and {row.lengths[1]} target tokens, allowed are "
                    f"{self.limits[0]} and {self.limits[1]}"
                )
        return reasons

    def _is_short(self, pair: SentencePair) -> bool:
        texts = (pair.source, pair.target)
        # Normalising other characters may make several of one. Up to four tokens are not the text's own.
        return all(text.isascii() and len(text) <= limit - 4 for text, limit in zip(texts, self.limits, strict=True))


def _fingerprint(tokenizer: Any) -> str:
    models: list[Any] = [getattr(tokenizer, name, None) for name in ("spm_source", "spm_target", "sp_model")]
    hashes = [
        hashlib.sha256(model.serialized_model_proto()).hexdigest()
        for model in models
        if hasattr(model, "serialized_model_proto")
    ]
    return encoders_fingerprint([], [tokenizer], {"sentencepiece": hashes})
