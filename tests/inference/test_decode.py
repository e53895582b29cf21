"""Our loops against transformers' `generate`: the same tokens and the same scores."""

from __future__ import annotations

import pytest
import torch

from mmattn.errors import CheckpointError, UsageError
from mmattn.inference.decode import DecodeSettings, decode
from tests.inference.stock_decoder import BOS, EOS, PAD, VOCAB, StockState, assert_same, stock_generate, tiny_marian

BASE = DecodeSettings(eos_token_id=EOS, pad_token_id=PAD)
SOURCES = torch.randint(4, VOCAB, (5, 7), generator=torch.Generator().manual_seed(3))

CASES = {
    "greedy": {},
    "greedy-long": {"max_new_tokens": 31},
    "greedy-max-length": {"max_length": 9},
    "greedy-min": {"min_new_tokens": 6, "max_new_tokens": 11},
    "greedy-min-length": {"min_length": 5, "max_new_tokens": 11},
    "greedy-ngram": {"no_repeat_ngram_size": 2, "max_new_tokens": 17},
    "greedy-repetition": {"repetition_penalty": 1.7, "max_new_tokens": 17},
    "greedy-bad-words": {"bad_words_ids": [[5], [7, 11], [EOS]], "max_new_tokens": 13},
    "greedy-forced": {"forced_bos_token_id": 13, "forced_eos_token_id": EOS, "max_new_tokens": 7},
    "greedy-suppress": {"suppress_tokens": [4, 6], "begin_suppress_tokens": [EOS, 9]},
    "greedy-two-eos": {"eos_token_id": [EOS, 17]},
    "greedy-no-eos": {"eos_token_id": None, "max_new_tokens": 9},
    "beam-3": {"num_beams": 3},
    "beam-4-long": {"num_beams": 4, "max_new_tokens": 29},
    "beam-early": {"num_beams": 3, "early_stopping": True, "max_new_tokens": 23},
    "beam-never": {"num_beams": 3, "early_stopping": "never", "max_new_tokens": 23},
    "beam-penalty": {"num_beams": 4, "length_penalty": 0.6, "max_new_tokens": 19},
    "beam-penalty-long": {"num_beams": 4, "length_penalty": 2.0, "max_new_tokens": 19, "early_stopping": "never"},
    "beam-penalty-negative": {"num_beams": 3, "length_penalty": -1.0, "max_new_tokens": 19},
    "beam-penalty-none": {"num_beams": 3, "length_penalty": 0.0, "early_stopping": "never", "max_new_tokens": 19},
    "beam-return": {"num_beams": 4, "num_return_sequences": 3, "max_new_tokens": 13},
    "beam-return-early": {"num_beams": 4, "num_return_sequences": 4, "early_stopping": True},
    "beam-ngram": {"num_beams": 3, "no_repeat_ngram_size": 2, "max_new_tokens": 17},
    "beam-bad-words": {"num_beams": 3, "bad_words_ids": [[5], [7, 11], [13, 4, 6]], "max_new_tokens": 17},
    "beam-repetition": {"num_beams": 3, "repetition_penalty": 1.3, "max_new_tokens": 17},
    "beam-min": {"num_beams": 3, "min_new_tokens": 8, "max_new_tokens": 17},
    "beam-forced": {"num_beams": 4, "forced_bos_token_id": 13, "forced_eos_token_id": EOS, "max_new_tokens": 9},
    "beam-two-eos": {"num_beams": 3, "eos_token_id": [EOS, 17], "max_new_tokens": 17},
    "beam-no-eos": {"num_beams": 3, "eos_token_id": None, "max_new_tokens": 9},
    "beam-one-token": {"num_beams": 3, "max_new_tokens": 1},
    "beam-renormalize": {"num_beams": 3, "renormalize_logits": True, "suppress_tokens": [4, 6, 8]},
}


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", CASES)
def test_equals_transformers(name, seed):
    model = tiny_marian(seed)
    prompt = torch.full((5, 1), BOS)
    theirs = stock_generate(model, SOURCES, CASES[name], prompt=prompt)
    state = StockState(model, SOURCES)
    ours = decode(state, prompt, BASE.updated(**CASES[name]))
    assert_same(ours, theirs)


@pytest.mark.parametrize(
    "name", ["greedy-long", "greedy-repetition", "beam-3", "beam-return", "beam-ngram", "beam-min"]
)
def test_longer_prompts_equal_transformers(name):
    model = tiny_marian(4)
    prompt = torch.cat((torch.full((5, 1), BOS), SOURCES[:, :3]), dim=1)
    assert_same(
        decode(StockState(model, SOURCES), prompt, BASE.updated(**CASES[name])),
        stock_generate(model, SOURCES, CASES[name], prompt=prompt),
    )


@pytest.mark.parametrize("name", ["greedy-long", "beam-4-long", "beam-return-early"])
def test_texts_that_share_a_context(name):
    model = tiny_marian(5)
    words = torch.randint(4, VOCAB, (6, 2), generator=torch.Generator().manual_seed(7))
    prompts = torch.cat((torch.full((6, 1), BOS), words), dim=1)
    theirs = stock_generate(model, SOURCES[:2].repeat_interleave(3, dim=0), CASES[name], prompt=prompts)
    state = StockState(model, SOURCES[:2], texts_per_context=3)
    assert_same(decode(state, prompts, BASE.updated(**CASES[name]), texts_per_context=3), theirs)


@pytest.mark.parametrize("arguments", [{"max_new_tokens": 31}, {"max_new_tokens": 31, "num_beams": 3}])
def test_finished_texts_leave_the_batch(arguments):
    model = tiny_marian(0, eos_bias=2.5)
    state = StockState(model, SOURCES)
    lengths = [len(text[0].tokens) for text in decode(state, torch.full((5, 1), BOS), BASE.updated(**arguments))]
    assert len(set(lengths)) > 1
    rows = state.rows_seen[1:]
    assert rows == sorted(rows, reverse=True)
    assert rows[-1] < rows[0]


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"temperature": 0.7},
        {"top_k": 5},
        {"top_k": 0, "top_p": 0.8},
        {"min_p": 0.1, "temperature": 1.5},
        {"typical_p": 0.7},
        {"num_return_sequences": 3},
        {"num_beams": 3},
        {"num_beams": 3, "top_k": 4, "temperature": 1.3},
    ],
    ids=str,
)
def test_sampling_draws_what_transformers_draws(arguments):
    """The distributions are equal, so equal generators make equal draws while no text leaves the batch."""
    arguments = {"do_sample": True, "max_new_tokens": 13, "min_new_tokens": 13, **arguments}
    model = tiny_marian(6)
    prompt = torch.full((5, 1), BOS)
    torch.manual_seed(11)
    theirs = stock_generate(model, SOURCES, arguments, prompt=prompt)
    generator = torch.Generator().manual_seed(11)
    ours = decode(StockState(model, SOURCES), prompt, BASE.updated(**arguments), generator=generator)
    assert_same(ours, theirs)


def test_sampling_leaves_the_global_generator_alone():
    model = tiny_marian(6)
    before = torch.random.get_rng_state()
    generator = torch.Generator().manual_seed(1)
    decode(StockState(model, SOURCES), torch.full((5, 1), BOS), BASE.updated(do_sample=True), generator=generator)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_beem": 3}, "unknown generation argument 'num_beem'; did you mean 'num_beams'?"),
        ({"penalty_alpha": 0.6}, "'penalty_alpha' is not supported"),
        ({"temperature": 0.5}, "temperature has no effect without do_sample=True"),
        ({"num_beams": 0}, "num_beams is 0"),
        ({"num_return_sequences": 2}, "needs as many beams"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"do_sample": True, "temperature": 0.0}, "temperature is 0.0"),
        ({"num_beams": 2, "early_stopping": "soon"}, "early_stopping is 'soon'"),
        ({"num_beams": 2, "early_stopping": 1}, "early_stopping is 1"),
        ({"num_beams": 2.5}, "num_beams is 2.5; it must be a whole number"),
        ({"no_repeat_ngram_size": -2}, "no_repeat_ngram_size is -2; it must be at least 0"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0; it must be above 0"),
        ({"length_penalty": "x"}, "length_penalty is 'x'; it must be a finite number"),
        ({"do_sample": True, "top_p": 1.5}, "top_p is 1.5; it must be at least 0 and at most 1"),
        ({"do_sample": "no"}, "do_sample is 'no'; it must be True or False"),
        ({"bad_words_ids": [0, 6]}, "bad_words_ids is .0, 6.; it must be a list of lists"),
        ({"bad_words_ids": [[]]}, "bad_words_ids is .*; it must be a list of lists"),
        ({"suppress_tokens": 5}, "suppress_tokens is 5; it must be a list of token numbers"),
        ({"eos_token_id": "</s>"}, "eos_token_id is '</s>'; it must be a token number or a list of them"),
    ],
)
def test_wrong_settings_are_named(arguments, message):
    with pytest.raises(UsageError, match=message.replace("?", r"\?")):
        BASE.updated(**arguments)


def test_none_switches_off_what_the_checkpoint_says():
    chosen = BASE.updated(num_beams=4, repetition_penalty=1.3, do_sample=True)
    chosen = chosen.updated(num_beams=None, repetition_penalty=None, top_k=None)
    assert (chosen.num_beams, chosen.repetition_penalty, chosen.top_k) == (1, 1.0, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"suppress_tokens": [3, 40]}, "suppress_tokens holds token 40, and this model has 40: 0 to 39"),
        ({"bad_words_ids": [[3], [4, 41]]}, "bad_words_ids holds token 41"),
        ({"num_beams": 21}, "num_beams is 21; that is too many for this model's 40 tokens"),
    ],
)
def test_a_vocabulary_that_lacks_tokens(arguments, message):
    with pytest.raises(UsageError, match=message):
        BASE.updated(**arguments).for_vocabulary(40)


def test_a_seed_is_no_generator():
    with pytest.raises(UsageError, match="generator is 3; give a torch.Generator"):
        decode(StockState(tiny_marian(), SOURCES), torch.full((5, 1), BOS), BASE.updated(do_sample=True), generator=3)


def test_prompt_that_fills_max_length():
    with pytest.raises(UsageError, match="the prompt has 4 tokens and max_length=4 counts it"):
        decode(StockState(tiny_marian(), SOURCES), torch.full((5, 4), BOS), BASE.updated(max_length=4))


def test_generation_config_file():
    settings = DecodeSettings.from_generation_config(
        {
            "num_beams": 4,
            "bad_words_ids": [[1]],
            "eos_token_id": 2,
            "transformers_version": "5.0",
            "top_k": None,
            "temperature": 0.0,  # of no effect without draws: stock opens such files
        },
        40,
    )
    assert (settings.num_beams, settings.bad_words_ids, settings.eos_ids) == (4, [[1]], (2,))
    assert settings.updated(max_length=7).total_length(3) == 7
    with pytest.warns(UserWarning, match="sets penalty_alpha, not supported and left out"):
        DecodeSettings.from_generation_config({"penalty_alpha": 0.6}, 40)
    with pytest.raises(CheckpointError, match="generation_config.json: num_beams is 'four'"):
        DecodeSettings.from_generation_config({"num_beams": "four"}, 40)
