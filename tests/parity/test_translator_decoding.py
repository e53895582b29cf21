"""Decoding with our networks against stock `generate`: tokens and scores, padded batches, Marian and M2M100."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import pytest
import torch
from torch import Tensor

from mmattn.inference.decode import DecodeSettings, Generated, decode
from mmattn.models.translator import TranslatorNetwork
from tests.inference.stock_decoder import assert_same, stock_generate
from tests.parity.translator_stock import Trio, sources, trio

MAX_LENGTH = 23
ROWS = 9
# Seed and bias of the end token, chosen so that sentences end at different steps, and some not at all.
MODELS = {"marian": (7, 3.5), "marian, two vocabularies": (6, 2.0), "m2m100": (25, 3.5)}
FORCED = [31, 37, 41, 37, 43, 47, 53, 59, 61]

CASES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "greedy, long": {"max_length": 47},
    "greedy, minimum": {"min_length": 9},
    "greedy, minimum of new tokens": {"min_new_tokens": 5, "max_new_tokens": 13},
    "greedy, no repeated pairs": {"no_repeat_ngram_size": 2},
    "greedy, bad words": {"bad_words_ids": [[5], [7, 11], [13, 17, 19], [0, 2]]},
    "greedy, forced end": {"forced_eos_token_id": 23},
    "1 token": {"max_new_tokens": 1},
    "4 beams": {"num_beams": 4},
    "6 beams": {"num_beams": 6},
    "4 beams, long": {"num_beams": 4, "max_length": 47},
    "4 beams, short preferred": {"num_beams": 4, "length_penalty": 0.4},
    "4 beams, long preferred": {"num_beams": 4, "length_penalty": 1.9},
    "4 beams, no penalty": {"num_beams": 4, "length_penalty": 0.0},
    "4 beams, early stopping": {"num_beams": 4, "early_stopping": True},
    "6 beams, early stopping": {"num_beams": 6, "early_stopping": True, "length_penalty": 0.7},
    "4 beams, never stopping early": {"num_beams": 4, "early_stopping": "never", "length_penalty": 1.4},
    "6 beams, never stopping early": {"num_beams": 6, "early_stopping": "never", "length_penalty": 0.6},
    "4 beams, no repeated pairs": {"num_beams": 4, "no_repeat_ngram_size": 2},
    "4 beams, bad words": {"num_beams": 4, "bad_words_ids": [[5], [11], [23]]},
    "4 beams, bad words of several tokens": {"num_beams": 4, "bad_words_ids": [[5], [7, 11], [13, 17, 19]]},
    "4 beams, minimum": {"num_beams": 4, "min_length": 9},
    "6 beams, 5 sequences": {"num_beams": 6, "num_return_sequences": 5},
    "4 beams, 4 sequences, early stopping": {"num_beams": 4, "num_return_sequences": 4, "early_stopping": True},
    "4 beams, forced end": {"num_beams": 4, "forced_eos_token_id": 23},
    "4 beams, repetition": {"num_beams": 4, "repetition_penalty": 1.3},
    "4 beams, renormalised": {"num_beams": 4, "renormalize_logits": True, "suppress_tokens": [5, 7]},
    "as OPUS-MT's generation_config.json": {
        "num_beams": 4,
        "bad_words_ids": [[96]],
        "forced_eos_token_id": 0,
        "max_length": 51,
        "renormalize_logits": True,
    },
}


@pytest.fixture(scope="module")
def trios(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trio]:
    return {
        kind: trio(tmp_path_factory.mktemp("stock"), kind, seed=seed, eos_bias=eos_bias)
        for kind, (seed, eos_bias) in MODELS.items()
    }


def settings(models: Trio, arguments: dict[str, Any]) -> DecodeSettings:
    config = models.stock.config
    return DecodeSettings(eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id).updated(**arguments)


def translate(
    network: TranslatorNetwork,
    ids: Tensor,
    mask: Tensor | None,
    settings: DecodeSettings,
    *,
    forced: Sequence[int] | None = None,
    **options: Any,
) -> list[list[Generated]]:
    """Decode with a state of the network's; `forced` are first tokens, one for each sentence."""
    with torch.no_grad():
        contexts = network.project_context(network.encode(ids, mask), mask)
    start = network.config.decoder_start_token_id
    first = [[]] * len(ids) if forced is None else [[token] for token in forced]
    prompt = torch.tensor([[start, *tokens] for tokens in first])
    state = network.start(contexts, max_length=settings.total_length(1))
    return decode(state, prompt, settings, num_forced=0 if forced is None else 1, **options)


def tokens_of(results: list[list[Generated]]) -> list[list[list[int]]]:
    return [[one.tokens for one in candidates] for candidates in results]


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("name", CASES)
def test_tokens_and_scores_are_stocks(trios, kind, name):
    models, arguments = trios[kind], {"max_length": MAX_LENGTH, **CASES[name]}
    if "max_new_tokens" in arguments:
        del arguments["max_length"]
    if "bad_words_ids" in arguments:
        vocabulary = models.ours.config.output_size
        arguments["bad_words_ids"] = [w for w in arguments["bad_words_ids"] if max(w) < vocabulary] or None
    ids, mask = sources(models.stock.config, rows=ROWS)
    theirs = stock_generate(models.stock, ids, arguments, mask=mask)
    assert_same(translate(models.ours, ids, mask, settings(models, arguments)), theirs)


@pytest.mark.parametrize("kind", MODELS)
def test_the_reference_says_something(trios, kind):
    """Sentences end at different steps, some do not end, and their tokens differ."""
    models = trios[kind]
    ids, mask = sources(models.stock.config, rows=ROWS)
    for arguments in ({}, {"num_beams": 4}):
        arguments = {"max_length": MAX_LENGTH, **arguments}
        results = [found[0].tokens for found in stock_generate(models.stock, ids, arguments, mask=mask)]
        assert len({len(tokens) for tokens in results}) > 2
        assert len(set(chain(*results))) > 6


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"min_length": 9},
        {"no_repeat_ngram_size": 1},
        {"num_beams": 4},
        {"num_beams": 4, "length_penalty": 0.3, "early_stopping": True},
        {"num_beams": 4, "num_return_sequences": 3, "min_new_tokens": 4, "bad_words_ids": [[31, 5], [7]]},
        {"num_beams": 3, "max_length": 3},
        {"begin_suppress_tokens": [5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16]},
    ],
    ids=str,
)
def test_each_sentence_may_be_given_its_first_token(trios, kind, arguments):
    models, arguments = trios[kind], {"max_length": MAX_LENGTH, **arguments}
    ids, mask = sources(models.stock.config, rows=ROWS)
    alone = [
        stock_generate(models.stock, source[None], arguments | {"forced_bos_token_id": token}, mask=kept[None])
        for source, kept, token in zip(ids, mask, FORCED, strict=True)
    ]
    ours = translate(models.ours, ids, mask, settings(models, arguments), forced=FORCED)
    assert_same(ours, list(chain(*alone)))
    assert [found[0].tokens[0] for found in ours] == FORCED


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("arguments", [{}, {"num_beams": 4, "num_return_sequences": 2}], ids=str)
def test_nothing_but_the_forced_token(trios, kind, arguments):
    models = trios[kind]
    ids, mask = sources(models.stock.config, rows=ROWS)
    chosen = settings(models, {"max_new_tokens": 1, **arguments})
    ours = translate(models.ours, ids, mask, chosen, forced=FORCED)
    count = arguments.get("num_return_sequences", 1)
    assert tokens_of(ours) == [[[token]] * count for token in FORCED]
    assert {one.score for one in chain(*ours)} == {0.0}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("arguments", [{}, {"num_beams": 4}, {"num_beams": 6, "early_stopping": True}], ids=str)
def test_company_and_padding_change_nothing(trios, kind, arguments):
    models, arguments = trios[kind], {"max_length": MAX_LENGTH, **arguments}
    ids, mask = sources(models.stock.config, rows=ROWS, length=13)
    chosen = settings(models, arguments)
    together = translate(models.ours, ids, mask, chosen)
    alone = [translate(models.ours, row[None, kept], None, chosen)[0] for row, kept in zip(ids, mask, strict=True)]
    assert_same(together, alone)


@pytest.mark.parametrize("kind", ["marian", "m2m100"])
@pytest.mark.parametrize(
    "arguments",
    [
        {"temperature": 0.7},
        {"top_k": 0, "top_p": 0.8, "num_return_sequences": 3},
        {"num_beams": 3, "num_return_sequences": 2, "top_k": 11},
    ],
    ids=str,
)
def test_draws_are_stocks_while_no_sentence_leaves(trios, kind, arguments):
    models = trios[kind]
    arguments = {"do_sample": True, "max_new_tokens": 13, "min_new_tokens": 13, **arguments}
    ids, mask = sources(models.stock.config, rows=ROWS)
    torch.manual_seed(7)
    theirs = stock_generate(models.stock, ids, arguments, mask=mask)
    generator = torch.Generator().manual_seed(7)
    ours = translate(models.ours, ids, mask, settings(models, arguments), generator=generator)
    assert_same(ours, theirs)
    assert len({tuple(one.tokens) for one in chain(*ours)}) >= len(ids), "draws that are all alike say little"
