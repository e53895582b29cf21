"""Sentence pairs to the batches on which a translator learns; a pure function of the pairs."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from mmattn.data.collate import IGNORED
from mmattn.data.sentence_pairs import ParallelSource, SentencePair, read_pairs
from mmattn.data.translation_tokens import PairTokenizer, TokenizedPair
from mmattn.errors import DataError, UsageError
from mmattn.ops.segments import Segments


class TranslationCollator:
    """Pads pairs on the right, or packs them, and lays out what the decoder reads and predicts.

    The decoder reads `start tokens`, and predicts `tokens eos`. For NLLB and M2M100 the target's language token stands
    first among the tokens; it is forced when translating, and not scored here unless asked for.

    Args:
        tokenizer: The translator's, or a `PairTokenizer` around it.
        max_source_length, max_target_length: Tokens per row at most, special tokens included. Longer pairs are
            refused, never cut: `translation_tokens.drop_too_long` leaves them out beforehand.
        decoder_start_id: What the decoder reads first (`decoder_start_token_id`).
        pad_id: Where the model's is not the tokenizer's.
        with_alignment: Also make the target of guided alignment (arXiv 1909.02074).
        score_language: Whether a language token is scored, as in transformers' examples.
        language_codes: See `PairTokenizer`.
        packed: Without padding: all sources one after the other, and all targets.

    Raises:
        UsageError: a size that leaves no room, no padding token, or packing with alignments.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | PairTokenizer,
        max_source_length: int = 512,
        max_target_length: int = 512,
        *,
        decoder_start_id: int,
        pad_id: int | None = None,
        with_alignment: bool = False,
        score_language: bool = False,
        language_codes: Mapping[str, str] | None = None,
        packed: bool = False,
    ) -> None:
        if max_source_length < 3 or max_target_length < 3:
            raise UsageError(
                f"max_source_length and max_target_length must be 3 or more, not {max_source_length} and "
                f"{max_target_length}"
            )
        if isinstance(tokenizer, PairTokenizer):
            if language_codes is not None:
                raise UsageError("give language_codes to the PairTokenizer, not to the collator")
            self.pair_tokenizer = tokenizer
        else:
            self.pair_tokenizer = PairTokenizer(tokenizer, language_codes=language_codes)
        own_pad = self.pair_tokenizer.tokenizer.pad_token_id
        if pad_id is None and own_pad is None:
            raise UsageError("the tokenizer has no padding token: pass pad_id")
        self.pad_id = int(own_pad if pad_id is None else pad_id)  # pyright: ignore[reportArgumentType]
        self.decoder_start_id = decoder_start_id
        self.max_source_length, self.max_target_length = max_source_length, max_target_length
        if packed and with_alignment:
            raise UsageError("alignments are read from padded batches: make a collator with packed or with_alignment")
        self.with_alignment, self.score_language, self.packed = with_alignment, score_language, packed

    def __call__(self, source: ParallelSource, draws: Sequence[tuple[int, int]]) -> dict[str, Any]:
        """The batch for (epoch, example) pairs; see `collate`."""
        return self.collate(read_pairs(source, [example for _, example in draws]))

    def collate(self, pairs: Sequence[SentencePair]) -> dict[str, Any]:
        """The batch of these pairs.

        Returns:
            Packed: `source_ids` int64 [N], `target_ids` and `labels` (-100 where not scored) int64 [M], and the
            `source_segments` and `target_segments` that say where each pair lies, shorter targets first.

            Padded: `source_ids` int64 and `source_mask` bool (False at padding) [B, Ls]; `target_ids` and `labels`
            (-100 where not scored) int64 [B, Lt]; with alignment also `alignment` float32 [B, Lt, Ls], how much of each
            label comes from each source token: rows sum to 1, or to 0 where nothing is aligned.

        Raises:
            DataError: a pair that is too long, or in a language that the tokenizer does not know.
        """
        rows = self.pair_tokenizer(pairs)
        for pair, row in zip(pairs, rows, strict=True):
            self._check_length(pair, row)
        return self._pack(rows) if self.packed else self._pad(pairs, rows)

    def _pack(self, rows: Sequence[TokenizedPair]) -> dict[str, Any]:
        # Neighbours of like length share a call where attention has no kernel for packed sequences.
        rows = sorted(rows, key=lambda row: row.lengths[::-1])
        sources, targets, labels = [row.source for row in rows], [], []
        for row in rows:
            read, label = self._target(row)
            targets.append(read)
            labels.append(label)
        parts = {"source_ids": sources, "target_ids": targets, "labels": labels}
        batch: dict[str, Any] = {
            name: torch.tensor(list(itertools.chain.from_iterable(lists)), dtype=torch.int64)
            for name, lists in parts.items()
        }
        batch["source_segments"] = Segments.of(map(len, sources))
        batch["target_segments"] = Segments.of(map(len, targets))
        return batch

    def _target(self, row: TokenizedPair) -> tuple[list[int], list[int]]:
        """What the decoder reads of a row, and the labels."""
        target = [*row.prefix, *row.target]
        unscored = 0 if self.score_language else len(row.prefix)
        return [self.decoder_start_id, *target[:-1]], [IGNORED] * unscored + target[unscored:]

    def _pad(self, pairs: Sequence[SentencePair], rows: Sequence[TokenizedPair]) -> dict[str, Any]:
        longest_source, longest_target = (max(sizes) for sizes in zip(*(row.lengths for row in rows), strict=True))
        source_ids = np.full((len(rows), longest_source), self.pad_id, dtype=np.int64)
        source_mask = np.zeros(source_ids.shape, dtype=bool)
        target_ids = np.full((len(rows), longest_target), self.pad_id, dtype=np.int64)
        labels = np.full(target_ids.shape, IGNORED, dtype=np.int64)
        for number, row in enumerate(rows):
            source_ids[number, : len(row.source)] = row.source
            source_mask[number, : len(row.source)] = True
            read, label = self._target(row)
            target_ids[number, : len(read)] = read
            labels[number, : len(label)] = label
        arrays = {"source_ids": source_ids, "source_mask": source_mask, "target_ids": target_ids, "labels": labels}
        if self.with_alignment:
            arrays["alignment"] = np.zeros((*target_ids.shape, longest_source), dtype=np.float32)
            for matrix, pair, row in zip(arrays["alignment"], pairs, rows, strict=True):
                self._align(matrix, pair, row)
        return {key: torch.from_numpy(array) for key, array in arrays.items()}

    def _check_length(self, pair: SentencePair, row: TokenizedPair) -> None:
        num_source, num_target = row.lengths
        if num_source > self.max_source_length or num_target > self.max_target_length:
            raise DataError(
                f"{pair.id} is too long: {num_source} source and {num_target} target tokens, allowed are "
                f"{self.max_source_length} and {self.max_target_length}"
            )

    def _align(self, matrix: np.ndarray, pair: SentencePair, row: TokenizedPair) -> None:
        """Words' alignment to tokens: all tokens of one to all of the other. matrix float32 [Lt, Ls], changed."""
        if not pair.alignment:
            return
        sources = self.pair_tokenizer.word_places(pair.source, len(row.text), is_target=False)
        targets = self.pair_tokenizer.word_places(pair.target, len(row.target) - 1, is_target=True)
        for source_word, target_word in pair.alignment:
            if source_word >= len(sources) or target_word >= len(targets):
                raise DataError(
                    f"{pair.id}: alignment {source_word}-{target_word} points past the words, of which there are "
                    f"{len(sources)} and {len(targets)}"
                )
            source, target = sources[source_word], targets[target_word]
            first, before = len(row.prefix) + target.start, row.text.start
            matrix[first : first + len(target), before + source.start : before + source.stop] = 1
        matrix /= np.maximum(matrix.sum(axis=1, keepdims=True), 1)
