"""Word alignments of a translator against gold ones: read while it is made to write the true translation."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mmattn.data.sentence_pairs import SentencePair
from mmattn.data.translation_collate import TranslationCollator
from mmattn.data.translation_tokens import PairTokenizer, TokenizedPair
from mmattn.errors import DataError
from mmattn.inference.hub import evaluating
from mmattn.inference.sources import token_batches
from mmattn.models.translator import TranslatorNetwork
from mmattn.models.translator.alignment import AlignmentReader

_BATCH_TOKENS = 4096

Links = set[tuple[int, int]]
"""(source word, target word), numbered over words split at white space."""


def alignment_scores(
    network: TranslatorNetwork, tokenizer: PairTokenizer, pairs: Sequence[SentencePair]
) -> dict[str, float]:
    """Precision, recall and F1 of the links that the cross-attention gives, over all links of all pairs.

    The decoder reads the true translation, so that both alignments speak of the same words. A target word is linked to
    the source word that gets most attention when its tokens are predicted, from the layer and heads that
    `Translator.translate(..., return_alignment=True)` reads: tokens of a source word are added up, those of a target
    word averaged. Words are split at white space, as gold alignments count them.

    Args:
        network: the translator's.
        tokenizer: the translator's.
        pairs: those without alignment are left out.

    Returns:
        `alignment/precision`, `alignment/recall`, `alignment/f1`, and `alignment/left_out` where pairs were longer than
        the model has positions, or of words that the tokenizer does not keep apart; empty where nothing is aligned.
    """
    return scores_by_reader(network, tokenizer, pairs, [network.alignment_reader()])[0]


def scores_by_reader(
    network: TranslatorNetwork,
    tokenizer: PairTokenizer,
    pairs: Sequence[SentencePair],
    readers: Sequence[AlignmentReader],
) -> list[dict[str, float]]:
    """As `alignment_scores`, for each of several readers of the network's attention, in one pass over the pairs."""
    aligned = [pair for pair in pairs if pair.alignment]
    if not aligned:
        return [{} for _ in readers]
    rows = tokenizer(aligned)
    limit = network.config.max_positions
    usable = [number for number, row in enumerate(rows) if max(row.lengths) <= limit]
    counts = [_Counts(left_out=len(aligned) - len(usable)) for _ in readers]
    for batch in token_batches([max(rows[number].lengths) for number in usable], _BATCH_TOKENS):
        chosen = [usable[place] for place in batch]
        for count, weights in zip(
            counts, _read_weights(network, tokenizer, [aligned[number] for number in chosen], readers), strict=True
        ):
            for number, of_pair in zip(chosen, weights, strict=True):
                count.add(aligned[number], rows[number], of_pair, tokenizer)
    return [count.scores() for count in counts]


@dataclass
class _Counts:
    """Links over all pairs."""

    right: int = 0
    given: int = 0
    gold: int = 0
    left_out: int = 0

    def add(self, pair: SentencePair, row: TokenizedPair, weights: np.ndarray, tokenizer: PairTokenizer) -> None:
        """One pair's, from attention [Lt, Ls]."""
        try:
            links = _links(pair, row, weights, tokenizer)
        except DataError:
            self.left_out += 1
            return
        gold = set(pair.alignment or ())
        self.right += len(links & gold)
        self.given += len(links)
        self.gold += len(gold)

    def scores(self) -> dict[str, float]:
        """See `alignment_scores`."""
        if not self.given:
            return {}
        scores = {
            "alignment/precision": self.right / self.given,
            "alignment/recall": self.right / self.gold,
            "alignment/f1": 2 * self.right / (self.given + self.gold),
        }
        return scores | ({"alignment/left_out": float(self.left_out)} if self.left_out else {})


def _read_weights(
    network: TranslatorNetwork,
    tokenizer: PairTokenizer,
    pairs: Sequence[SentencePair],
    readers: Sequence[AlignmentReader],
) -> list[np.ndarray]:
    """For each reader attention [B, Lt, Ls] from the place at which each target token is predicted."""
    config = network.config
    collate = TranslationCollator(
        tokenizer,
        config.max_positions,
        config.max_positions,
        decoder_start_id=config.decoder_start_token_id,
        pad_id=config.pad_token_id,
    )
    device = next(network.parameters()).device
    batch = {name: tensor.to(device) for name, tensor in collate.collate(pairs).items()}
    with evaluating(network), contextlib.ExitStack() as reading:
        states = network.encode(batch["source_ids"], batch["source_mask"])
        contexts = network.project_context(states, batch["source_mask"])
        for reader in readers:
            reading.enter_context(reader.reading())
        network.decoder(batch["target_ids"], contexts)
        return [reader.take().float().cpu().numpy() for reader in readers]


def _links(pair: SentencePair, row: TokenizedPair, weights: np.ndarray, tokenizer: PairTokenizer) -> Links:
    sources = tokenizer.word_places(pair.source, len(row.text), is_target=False)
    targets = tokenizer.word_places(pair.target, len(row.target) - 1, is_target=True)
    first = len(row.prefix)
    of_words = _summed(_summed(weights[first:, row.text.start : row.text.stop], sources).T, targets)
    best = of_words.argmax(axis=0)
    return {(int(best[word]), word) for word, place in enumerate(targets) if len(place)}


def _summed(columns: np.ndarray, places: Sequence[range]) -> np.ndarray:
    """Columns [N, tokens] to [N, words]."""
    totals = np.concatenate([np.zeros_like(columns[:, :1]), columns.cumsum(axis=1)], axis=1)
    return totals[:, [place.stop for place in places]] - totals[:, [place.start for place in places]]
