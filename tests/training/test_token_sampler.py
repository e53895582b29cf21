"""Batches by token count: pure, complete, within their limits, and shared out alike for any number of processes."""

from __future__ import annotations

import itertools
import pickle

import numpy as np
import pytest
import torch

from mmattn.errors import DataError, UsageError
from mmattn.training import token_sampler
from mmattn.training.batches import make_sampler, step_batches
from mmattn.training.memory import estimate_run
from mmattn.training.token_sampler import TokenSampler, token_lengths
from tests.training.toy import LENGTH, RaggedTask, ToyTask, toy_config


def make_lengths(number=1709, sides=2, seed=0):
    random = np.random.default_rng(seed)
    first = np.clip(random.lognormal(2.7, 0.6, number), 1, 101).astype(np.int64)
    others = [np.clip(first * random.normal(1.1, 0.2, number), 0, 101).astype(np.int64) for _ in range(sides - 1)]
    return np.stack([first, *others], axis=1)


LENGTHS = make_lengths()
LIMIT = 307


def epochs_of(sampler, number):
    """The steps' draws of the first epochs, by epoch."""
    found = [[] for _ in range(number)]
    for step in itertools.count():
        draws = sampler.draws(step)
        (epoch,) = {epoch for epoch, _ in draws}
        if epoch == number:
            return found
        found[epoch].append([example for _, example in draws])


def padded(lengths, examples):
    return max(len(examples) * lengths[examples, side].max() for side in range(lengths.shape[1]))


@pytest.mark.parametrize("sides", [1, 2, 3])
@pytest.mark.parametrize("limit", [101, 307, 10**6])
def test_each_example_is_drawn_once_an_epoch_within_the_limit(sides, limit):
    lengths = make_lengths(sides=sides)
    sampler = TokenSampler(lengths, limit, seed=3)
    for batches in epochs_of(sampler, 3):
        assert sorted(itertools.chain(*batches)) == list(range(len(lengths)))
        assert all(padded(lengths, batch) <= limit for batch in batches)


def test_epochs_differ_in_order_and_in_company():
    first, second = epochs_of(TokenSampler(LENGTHS, 101), 2)
    assert {frozenset(batch) for batch in first}.isdisjoint(frozenset(batch) for batch in second if len(batch) > 2)
    longest = [int(LENGTHS[batch].max()) for batch in first]
    assert abs(np.corrcoef(longest, range(len(longest)))[0, 1]) < 0.2  # not from long to short
    other = epochs_of(TokenSampler(LENGTHS, 101, seed=1), 1)[0]
    assert first != other


@pytest.mark.parametrize("processes", [1, 2, 3, 4])
@pytest.mark.parametrize("micro", [None, 101])
def test_a_step_is_a_function_of_seed_and_step(processes, micro):
    straight = TokenSampler(LENGTHS, LIMIT, 5)
    expected = [straight.draws(step) for step in range(300)]
    assert expected[-1][0][0] >= 2  # epochs
    for step in (299, 0, 150, 151, 3):
        assert TokenSampler(LENGTHS, LIMIT, 5, processes, micro).draws(step) == expected[step]
    used = TokenSampler(LENGTHS, LIMIT, 5, processes, micro)
    used.draws(120)
    assert [pickle.loads(pickle.dumps(used)).draws(step) for step in (119, 290)] == [expected[119], expected[290]]


@pytest.mark.parametrize("limit", [101, 307, 10**6])
def test_a_resumed_run_counts_the_batches_of_past_epochs_without_making_them(limit, monkeypatch):
    straight, made = TokenSampler(LENGTHS, limit, 5), []
    first_steps = np.cumsum([0] + [len(token_sampler._epoch(straight, epoch).starts) for epoch in range(6)]).tolist()
    epoch_of = token_sampler._epoch
    monkeypatch.setattr(token_sampler, "_epoch", lambda sampler, epoch: made.append(epoch) or epoch_of(sampler, epoch))
    resumed = TokenSampler(LENGTHS, limit, 5)
    assert [resumed.draws(step)[0][0] for step in (first_steps[5], first_steps[5] - 1)] == [5, 4]
    assert set(made) == {5, 4}


@pytest.mark.parametrize("processes", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("micro", [None, 101, 149])
def test_processes_and_micro_batches_share_a_step(processes, micro):
    sampler = TokenSampler(LENGTHS, LIMIT, 0, processes, micro)
    fill_ins, counts = 0, set()
    for step in range(200):
        parts, number = [], sampler.num_micro_batches(step)
        counts.add(number)
        for rank in range(processes):
            scored = sampler.num_scored(step, rank)
            own = [sampler.micro_draws(step, rank, index) for index in range(number)]
            assert all(padded(LENGTHS, [example for _, example in part]) <= (micro or LIMIT) for part in own)
            assert all(part == sampler.draws(step)[-1:] for part in own[scored:])
            assert number - scored <= 1
            fill_ins += number - scored
            parts += own[:scored]
        assert sorted(draw for part in parts for draw in part) == sorted(sampler.draws(step))
        assert sum(map(len, parts)) == sampler.num_draws(step)
    if micro is None or processes <= 2:
        assert (len(counts) > 1) == (micro is not None)
    if processes == 7:  # more than a step of long examples has
        assert fill_ins


def test_like_lengths_come_together():
    sampler = TokenSampler(LENGTHS, LIMIT)
    batches = epochs_of(sampler, 1)[0]
    slots = sum(len(batch) * LENGTHS[batch].max(axis=0).sum() for batch in batches)
    assert sampler.filled_share() == pytest.approx(LENGTHS.sum() / slots)
    assert sampler.filled_share() > 0.85
    assert sampler.remarks() == [
        f"batches by tokens: {len(batches)} batches an epoch, {sampler.filled_share():.0%} of the slots hold tokens; "
        "batch_size is not used"
    ]


def test_the_words_of_the_log():
    assert TokenSampler(LENGTHS, 4096).describe() == "batches of up to 4,096 tokens"
    text = "batches of up to 4,096 tokens over 2 processes in micro-batches of up to 1,024"
    assert TokenSampler(LENGTHS, 4096, 0, 2, 1024).describe() == text


def test_an_empty_example_takes_a_place():
    sampler = TokenSampler(np.zeros((11, 1), dtype=np.int64), 3)
    assert [sampler.num_draws(step) for step in range(4)].count(3) == 3


def test_too_long_an_example_is_named():
    lengths = np.array([[3, 5], [13, 2], [7, 11]])
    with pytest.raises(
        DataError,
        match=r"^training example 1 has 13 tokens, more than training\.batch_tokens 10 allows, and 1 others are too "
        r"long: raise batch_tokens, or shorten or leave out such examples$",
    ):
        TokenSampler(lengths, 10)
    with pytest.raises(DataError, match=r"example 1 has 13 tokens, more than training\.micro_batch_tokens 12 allows: "):
        TokenSampler(lengths, 100, micro_batch_tokens=12)
    with pytest.raises(DataError, match="no examples"):
        TokenSampler(np.zeros((0, 1), dtype=np.int64), 10)


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        (None, "needs the token count of every example, and RaggedTask has no lengths: use batch_size"),
        (np.ones(22, dtype=int), r"RaggedTask\.lengths must be integers of shape \(23,\) or .*, not int64 of shape"),
        (np.ones(23), r"must be integers of shape \(23,\) or \(23, sides\), not float64 of shape \(23,\)"),
        (np.ones((23, 0), dtype=int), r"not int64 of shape \(23, 0\)"),
        (np.arange(23) - 1, "must not be negative: example 0 has -1"),
    ],
)
def test_lengths_that_cannot_be_used(tmp_path, lengths, message):
    task = RaggedTask()
    task.lengths = lengths
    with pytest.raises(UsageError, match=message):
        make_sampler(task, toy_config(tmp_path, batch_tokens=10))
    assert make_sampler(task, toy_config(tmp_path)).num_draws(0) == 6


def test_lengths_of_any_integers_are_the_same():
    task = RaggedTask()
    expected = make_sampler(task, toy_config("x", batch_tokens=10)).lengths_checksum()
    assert expected is not None
    task.lengths = task.lengths.astype(np.int16)[:, None]
    assert token_lengths(task).dtype == np.int64
    assert make_sampler(task, toy_config("x", batch_tokens=10)).lengths_checksum() == expected
    task.lengths[4] += 1
    assert make_sampler(task, toy_config("x", batch_tokens=10)).lengths_checksum() != expected
    assert make_sampler(ToyTask(), toy_config("x")).lengths_checksum() is None


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_loader_gives_each_step_its_own_number_of_micro_batches(num_workers):
    task = RaggedTask()
    sampler = make_sampler(task, toy_config("x", batch_tokens=20, micro_batch_tokens=8), num_processes=2)
    steps = list(step_batches(task, sampler, rank=1, first_step=2, last_step=17, num_workers=num_workers))
    assert [len(batches) for batches in steps] == [sampler.num_micro_batches(step) for step in range(2, 17)]
    assert len({len(batches) for batches in steps}) > 1
    for step, batches in enumerate(steps, start=2):
        for index, batch in enumerate(batches):
            expected = task.collate(sampler.micro_draws(step, 1, index))
            assert torch.equal(batch["labels"], expected["labels"])


def test_memory_is_that_of_a_full_batch_of_long_examples():
    sizes = []

    class Watched(RaggedTask):
        def collate(self, draws):
            sizes.append(self.lengths[[example for _, example in draws]].tolist())
            return super().collate(draws)

    def activations(**options):
        return estimate_run(Watched(has_batch_norm=False), toy_config("x", **options)).activations

    one = activations(batch_tokens=2 * LENGTH)
    assert activations(batch_tokens=20 * LENGTH) == pytest.approx(10 * one, rel=1e-3)
    assert activations(batch_tokens=20 * LENGTH, micro_batch_tokens=2 * LENGTH) == one
    assert sizes == [[LENGTH, LENGTH]] * 3
    assert activations(batch_size=2) < one  # of the first examples, which are short
