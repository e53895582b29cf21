"""What the loops add to `generate`: forced first tokens, rows, streams, and choices made at less expense."""

from __future__ import annotations

import math

import pytest
import torch
from transformers.generation import logits_process

from mmattn.errors import UsageError
from mmattn.inference.decode import DecodeSettings, decode, stream
from mmattn.inference.decode.logits import NeverTokens, Scorer, build_processors, largest, likeliest
from tests.inference.stock_decoder import BOS, EOS, PAD, VOCAB, StockState, stock_generate, tiny_marian

BASE = DecodeSettings(eos_token_id=EOS, pad_token_id=PAD)
SOURCES = torch.randint(4, VOCAB, (5, 7), generator=torch.Generator().manual_seed(3))
PROMPT = torch.full((5, 1), BOS)
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "arguments",
    [{}, {"max_new_tokens": 17}, {"num_beams": 3, "min_new_tokens": 4}, {"num_beams": 3, "max_length": 9}],
    ids=str,
)
def test_forced_tokens_count_as_generated(arguments):
    model = tiny_marian(1)
    settings = BASE.updated(**arguments)
    prompt = torch.cat((PROMPT, torch.tensor([[13], [17], [19], [23], [29]])), dim=1)
    found = decode(StockState(model, SOURCES), prompt, settings, num_forced=1)
    for row, token in enumerate(prompt[:, 1].tolist()):
        expected = stock_generate(model, SOURCES[row : row + 1], {**arguments, "forced_bos_token_id": token})[0][0]
        assert found[row][0].tokens == expected.tokens
        assert found[row][0].score == pytest.approx(expected.score, rel=1e-4, abs=1e-4)
    not_counted = decode(StockState(model, SOURCES), prompt, settings)
    assert all(one[0].tokens[:1] != [token] for one, token in zip(not_counted, (13, 17, 19, 23, 29), strict=True))


@pytest.mark.parametrize("arguments", [{}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 3}], ids=str)
def test_rows_say_who_chose_each_token(arguments):
    """Replayed on another state: row `rows[t]` of step t has seen the tokens before, and this is its token's score."""
    model = tiny_marian(0, eos_bias=2.5)
    state = _Recorder(model, SOURCES)
    found = decode(state, PROMPT, BASE.updated(max_new_tokens=17, **arguments), keep_rows=True)
    assert len({len(one.tokens) for candidates in found for one in candidates}) > 1
    for candidates in found:
        for one in candidates:
            assert one.rows is not None
            assert len(one.rows) == len(one.tokens)
            for step, row in enumerate(one.rows):
                assert state.read[step][row].tolist() == [BOS, *one.tokens[:step]]
    plain = decode(StockState(model, SOURCES), PROMPT, BASE.updated(max_new_tokens=17, **arguments))
    assert [[one.tokens for one in each] for each in plain] == [[one.tokens for one in each] for each in found]
    assert plain[0][0].rows is None


def test_the_first_token_of_every_sample_was_chosen_by_its_prompts_one_row():
    state, settings = _Recorder(tiny_marian(0), SOURCES), BASE.updated(do_sample=True, num_return_sequences=3)
    found = decode(state, PROMPT, settings, generator=torch.Generator().manual_seed(1), keep_rows=True)
    assert len(state.read[0]) == len(found)
    for number, candidates in enumerate(found):
        for one in candidates:
            assert one.rows is not None
            assert one.rows[0] == number
            for step, row in enumerate(one.rows):
                assert state.read[step][row].tolist() == [BOS, *one.tokens[:step]]


class _Recorder(StockState):
    """Keeps what each row had read at each step."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.read: list[torch.Tensor] = []

    def logits(self, input_ids):
        scores = super().logits(input_ids)
        self.read.append(self.ids.clone())
        return scores


@pytest.mark.parametrize("arguments", [{}, {"do_sample": True, "num_return_sequences": 2}], ids=str)
def test_scores_that_nobody_wants_are_not_a_number(arguments):
    model = tiny_marian(0)
    states = [StockState(model, SOURCES) for _ in range(2)]
    settings = BASE.updated(**arguments)
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    plain = decode(states[0], PROMPT, settings, generator=generators[0], with_scores=False)
    scored = decode(states[1], PROMPT, settings, generator=generators[1])
    assert [[one.tokens for one in each] for each in plain] == [[one.tokens for one in each] for each in scored]
    assert all(math.isnan(one.score) for each in plain for one in each)
    assert not any(math.isnan(one.score) for each in scored for one in each)
    beams = decode(StockState(model, SOURCES), PROMPT, BASE.updated(num_beams=2), with_scores=False)
    assert not any(math.isnan(one.score) for each in beams for one in each), "beams cannot do without"


@pytest.mark.parametrize("num_forced", [0, 1])
@pytest.mark.parametrize("arguments", [{}, {"max_new_tokens": 1}, {"do_sample": True}, {"eos_token_id": None}], ids=str)
def test_a_stream_gives_the_tokens_that_decode_gives(arguments, num_forced):
    model = tiny_marian(3)
    settings = BASE.updated(**arguments)
    prompt = torch.tensor([[BOS, 13]]) if num_forced else PROMPT[:1]
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    whole = decode(StockState(model, SOURCES[:1]), prompt, settings, num_forced=num_forced, generator=generators[0])
    state = StockState(model, SOURCES[:1])
    pieces = stream(state, prompt, settings, num_forced=num_forced, generator=generators[1])
    assert list(pieces) == whole[0][0].tokens


def test_a_stream_decodes_as_it_is_read_and_leaves_the_callers_mode_alone():
    state = StockState(tiny_marian(3), SOURCES[:1])
    pieces = stream(state, PROMPT[:1], BASE.updated(min_new_tokens=5))
    for number in range(1, 4):
        next(pieces)
        assert len(state.rows_seen) == number
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()


@pytest.mark.parametrize("arguments", [{"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}])
def test_a_stream_of_several_texts_is_refused(arguments):
    pieces = stream(StockState(tiny_marian(), SOURCES[:1]), PROMPT[:1], BASE.updated(**arguments))
    with pytest.raises(UsageError, match="use num_beams=1 and num_return_sequences=1"):
        next(pieces)


def _scores(rows: int, size: int, kind: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(size)
    scores = torch.randn(rows, size, generator=generator)
    if kind == "ties":
        return scores.mul(2).round()
    if kind == "mostly -inf":
        return scores.masked_fill(torch.rand(rows, size, generator=generator) < 0.999, float("-inf"))
    if kind == "all -inf":
        return torch.full_like(scores, float("-inf"))
    if kind == "at the end":
        scores[:, -1] = 50.0
        scores[:, -3] = 40.0
    return scores


KINDS = ("plain", "ties", "mostly -inf", "all -inf", "at the end")
SIZES = (97, 1024, 1025, 4096, 58101)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("count", [1, 8, 13])
def test_the_largest_are_topks(kind, size, count):
    scores = _scores(5, size, kind)
    values, places = largest(scores.clone(), count)
    assert torch.equal(values, scores.topk(count).values)
    assert torch.equal(scores.gather(1, places), values), "ties may be broken either way, but a place has its value"
    assert all(len(set(row)) == count for row in places.tolist())
    if kind in ("plain", "at the end"):
        assert torch.equal(places, scores.topk(count).indices)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_the_likeliest_is_argmaxs(kind, size):
    scores = _scores(5, size, kind)
    assert torch.equal(likeliest(scores), scores.argmax(dim=1))


@pytest.mark.parametrize("words", [[[5]], [[5], [7], [41]], [[5], [EOS]], [[EOS]]], ids=str)
def test_single_bad_words_are_struck_out_as_stock_does(words):
    scores = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(0))
    ids = torch.full((3, 4), 11)
    kept = [word for word in words if word != [EOS]]
    expected = scores
    if kept:
        stock = logits_process.NoBadWordsLogitsProcessor(words, torch.tensor([EOS]))
        expected = stock(ids, scores.clone())
    ours = build_processors(BASE.updated(bad_words_ids=words), 1, CPU)
    assert torch.equal(ours(ids, scores.clone()), expected)
    assert [type(each) for each in ours] == [NeverTokens] * bool(kept), "and nothing else is run"


@pytest.mark.parametrize(
    "arguments", [{"min_length": 5}, {"min_new_tokens": 3}, {"min_new_tokens": 3, "min_length": 9}]
)
@pytest.mark.parametrize("eos", [EOS, [EOS, 17]])
def test_the_end_is_held_back_as_stock_does(arguments, eos):
    scores = torch.randn(2, VOCAB, generator=torch.Generator().manual_seed(0))
    tokens = torch.tensor([eos] if isinstance(eos, int) else eos)
    ours = build_processors(BASE.updated(eos_token_id=eos, **arguments), 2, CPU)
    if "min_new_tokens" in arguments:
        stock = logits_process.MinNewTokensLengthLogitsProcessor(2, arguments["min_new_tokens"], tokens)
    else:
        stock = logits_process.MinLengthLogitsProcessor(arguments["min_length"], tokens)
    for length in range(2, 9):
        ids = torch.full((2, length), 11)
        assert torch.equal(ours(ids, scores.clone()), stock(ids, scores.clone())), length


@pytest.mark.parametrize("count", [1, 8])
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"bad_words_ids": [[5], [7]], "min_length": 6},
        {"forced_eos_token_id": EOS, "max_length": 6},
        {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2},
        {"renormalize_logits": True, "bad_words_ids": [[5]]},
    ],
    ids=str,
)
def test_the_best_are_those_of_the_whole_vocabulary(arguments, count):
    settings = BASE.updated(**arguments)
    scorer = Scorer(settings, 1, CPU)
    for length in (3, 5, 6):
        ids = torch.randint(4, VOCAB, (9, length), generator=torch.Generator().manual_seed(length))
        logits = 3 * torch.randn(9, 2011, generator=torch.Generator().manual_seed(length))
        scores, tokens = scorer.best(ids, logits.clone(), count)
        everything = scorer.log_probs(ids, logits.clone())
        torch.testing.assert_close(scores, everything.topk(count).values, rtol=1e-5, atol=1e-5)
        finite = scores.isfinite()
        assert torch.equal(tokens[finite], everything.topk(count).indices[finite])
