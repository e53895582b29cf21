"""Word alignments of a translator against gold ones: read while it is made to write the true translation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mmattn.data.sentence_pairs import SentencePair
from mmattn.data.translation_collate import TranslationCollator
from mmattn.data.translation_tokens import PairTokenizer, TokenizedPair
from mmattn.errors import DataError
from mmattn.inference.hub import evaluating
from mmattn.inference.sources import token_batches
from mmattn.models.translator import TranslatorNetwork

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
    aligned = [pair for pair in pairs if pair.alignment]
    if not aligned:
        return {}
    rows = tokenizer(aligned)
    limit = network.config.max_positions
    usable = [number for number, row in enumerate(rows) if max(row.lengths) <= limit]
    num_right = num_given = num_gold = 0
    left_out = len(aligned) - len(usable)
    for batch in token_batches([max(rows[number].lengths) for number in usable], _BATCH_TOKENS):
        chosen = [usable[place] for place in batch]
        weights = _read_weights(network, tokenizer, [aligned[number] for number in chosen])
        for number, of_pair in zip(chosen, weights, strict=True):
            try:
                links = _links(aligned[number], rows[number], of_pair, tokenizer)
            except DataError:
                left_out += 1
                continue
            gold = set(aligned[number].alignment or ())
            num_right += len(links & gold)
            num_given += len(links)
            num_gold += len(gold)
    if not num_given:
        return {}
    scores = {
        "alignment/precision": num_right / num_given,
        "alignment/recall": num_right / num_gold,
        "alignment/f1": 2 * num_right / (num_given + num_gold),
    }
    return scores | ({"alignment/left_out": float(left_out)} if left_out else {})


def _read_weights(network: TranslatorNetwork, tokenizer: PairTokenizer, pairs: Sequence[SentencePair]) -> np.ndarray:
    """Attention [B, Lt, Ls] from the place at which each target token is predicted."""
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
    with evaluating(network):
        states = network.encode(batch["source_ids"], batch["source_mask"])
        contexts = network.project_context(states, batch["source_mask"])
        reader = network.alignment_reader()
        with reader.reading():
            network.decoder(batch["target_in"], contexts)
        return reader.take().float().cpu().numpy()


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
