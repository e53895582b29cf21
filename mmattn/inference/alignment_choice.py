"""Which heads of the decoder tell best what a word was translated from, found on pairs with gold alignments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from mmattn.data.sentence_pairs import ParallelSource, SentencePair, read_pairs, spread
from mmattn.data.translation_tokens import PairTokenizer
from mmattn.inference.alignment_scores import scores_by_reader
from mmattn.inference.translator import Translator
from mmattn.models.translator import TranslatorNetwork

_SAMPLE = 200  # pairs that tell heads apart


class AlignmentHeads(NamedTuple):
    """Heads of a layer of the decoder's cross-attention, None for all, and the F1 of the alignments that they give."""

    layer: int
    heads: list[int] | None
    f1: float


def rank_alignment_heads(
    network: TranslatorNetwork, tokenizer: PairTokenizer, pairs: Sequence[SentencePair]
) -> list[AlignmentHeads]:
    """Every head of every layer, and every layer's average, the best first; empty where no pair has an alignment.

    Untaught heads look where it helps them, and mostly a few of them look at the word that is being translated
    (arXiv 1905.13655); which ones is a matter of chance.
    """
    config = network.config
    choices = [[head] for head in range(config.decoder_heads)] + [None]
    places = [(layer, heads) for layer in range(config.decoder_layers) for heads in choices]
    readers = [network.alignment_reader(layer, heads) for layer, heads in places]
    scores = scores_by_reader(network, tokenizer, pairs, readers)
    found = [
        AlignmentHeads(*place, of_place["alignment/f1"])
        for place, of_place in zip(places, scores, strict=True)
        if of_place
    ]
    return sorted(found, key=lambda each: -each.f1)


def choose_alignment_heads(translator: Translator, source: ParallelSource, language_codes: Mapping[str, str]) -> None:
    """Name the best heads in the network's config, judged on 200 pairs of a source, evenly spread.

    Nothing changes where those have no alignments.
    """
    pairs = [pair for pair in read_pairs(source, spread(len(source), _SAMPLE).tolist()) if pair.alignment]
    network, tokenizer = translator.network, PairTokenizer(translator.tokenizer, language_codes=language_codes)
    ranking = rank_alignment_heads(network, tokenizer, pairs) if pairs else []
    if ranking:
        network.config.alignment_layer, network.config.alignment_heads = ranking[0].layer, ranking[0].heads
