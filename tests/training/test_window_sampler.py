"""Streamed examples: each once an epoch, well mixed, a pure function of (seed, step), whoever asks and how often."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pytest

from mmattn.errors import DataError, UsageError
from mmattn.training.batches import make_sampler
from mmattn.training.token_sampler import TokenSampler
from mmattn.training.window_order import WindowOrder
from mmattn.training.window_sampler import (
    WindowSampler,
    WindowTokenSampler,
    stream_differences,
    stream_facts,
)
from tests.training.toy import RaggedTask, ToyTask, toy_config

SHARDS = (401, 3, 211, 97, 307, 1, 503)  # examples of each
STARTS = np.append(0, np.cumsum(SHARDS))


@dataclass
class Layout:
    bounds: np.ndarray
    window: int = 61
    blocks_at_once: int = 5
    shards: dict[str, str] = field(default_factory=dict)


def bounds(unit: int = 7) -> np.ndarray:
    """Units of up to 7 examples that stay within their shard."""
    starts = [start + place for start, size in zip(STARTS, SHARDS, strict=False) for place in range(0, size, unit)]
    return np.array([*starts, STARTS[-1]])


def order(**options) -> WindowOrder:
    return WindowOrder(**{"bounds": bounds(), "window": 61, "blocks_at_once": 5, "seed": 3, **options})


def epoch_examples(windows: WindowOrder, epoch: int) -> np.ndarray:
    return np.concatenate([windows.examples(epoch, window) for window in range(windows.num_windows(epoch))])


@pytest.mark.parametrize("unit", [1, 7, 101, 1000])
@pytest.mark.parametrize(("window", "blocks"), [(1, 1), (61, 5), (61, 1), (7, 13), (400, 3), (5000, 4)])
def test_every_example_once_an_epoch_and_found_again(unit, window, blocks):
    windows = order(bounds=bounds(unit), window=window, blocks_at_once=blocks)
    for epoch in (0, 3):
        examples = epoch_examples(windows, epoch)
        assert sorted(examples) == list(range(len(windows))) == list(range(STARTS[-1]))
        for place in (0, 1, 60, 61, 700, len(windows) - 1, *range(17, len(windows), 89)):
            number, rest = windows.find(epoch, place)
            assert windows.examples(epoch, number)[rest] == examples[place]


def test_epochs_and_seeds_differ_and_repeat():
    first = epoch_examples(order(), 0)
    assert np.array_equal(first, epoch_examples(order(), 0))
    assert not np.array_equal(first, epoch_examples(order(), 1))
    assert not np.array_equal(first, epoch_examples(order(seed=4), 0))


def test_windows_have_about_the_size_asked_for_and_few_blocks():
    windows = order(bounds=np.arange(0, 100_003, 11), window=997, blocks_at_once=13)
    for number in range(windows.num_windows(0)):
        examples = windows.examples(0, number)
        assert 700 < len(examples) < 1400
        blocks = np.unique(np.searchsorted(windows.edges, examples, side="right"))
        assert len(blocks) <= 13


def test_large_units_are_passed_through_once_in_several_windows():
    windows = order(bounds=np.arange(0, 60_001, 3000), window=499, blocks_at_once=4)
    met = Counter()
    for number in range(windows.num_windows(0)):
        blocks = np.unique(windows.examples(0, number) // 3000)
        assert len(blocks) == 4
        met.update(blocks.tolist())
    assert set(met.values()) == {24}  # 4 blocks of 3000 in windows of about 499
    in_order = [np.unique(windows.examples(0, number) // 3000).tolist() for number in range(windows.num_windows(0))]
    assert in_order == sorted(in_order, key=in_order.index)
    assert sum(one != other for one, other in itertools.pairwise(in_order)) == 4


def test_neighbours_come_from_all_over_the_data():
    windows = order(bounds=np.arange(0, 50_001, 10), window=1000, blocks_at_once=16)
    examples = epoch_examples(windows, 0)
    batches = examples[: len(examples) // 32 * 32].reshape(-1, 32)
    gaps = np.abs(np.diff(examples))
    assert np.median(gaps) > 50_000 / 8  # a perfect shuffle has 50,000 * 0.29
    assert (gaps < 10).mean() < 0.02
    places = [len(set((batch // 1000).tolist())) for batch in batches]  # of 50; a perfect shuffle meets 24
    assert np.mean(places) > 11
    assert np.abs(np.corrcoef(examples[:-1], examples[1:])[0, 1]) < 0.15


def test_batches_of_equally_many_examples():
    sampler = WindowSampler(order(), 29)
    size, number = len(sampler.order), 2 * len(sampler.order) // 29
    drawn = Counter(draw for step in range(number) for draw in sampler.draws(step))
    assert set(drawn.values()) == {1}
    assert sum(1 for epoch, _ in drawn if epoch == 0) == size
    assert all(sampler.num_draws(step) == len(sampler.draws(step)) == 29 for step in range(number))


def test_a_step_does_not_depend_on_what_was_asked_before():
    steps = [WindowSampler(order(), 29).draws(step) for step in (500, 3, 77)]
    sampler = WindowSampler(order(), 29)
    assert [sampler.draws(step) for step in range(501)][500] == steps[0]
    assert [sampler.draws(step) for step in (3, 77)] == steps[1:]


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_processes_and_micro_batches_share_a_step(processes):
    sampler = WindowSampler(order(), 28, processes, 3)
    for step in (0, 11, 60):
        shares = [
            draw
            for rank in range(processes)
            for index in range(sampler.num_micro_batches(step))
            for draw in sampler.micro_draws(step, rank, index)
        ]
        assert sorted(shares) == sorted(WindowSampler(order(), 28).draws(step))


LENGTHS = np.random.default_rng(5).integers(1, 23, (STARTS[-1], 2), dtype=np.int32)


def tokens(lengths: np.ndarray = LENGTHS, limit: int = 131, **options) -> WindowTokenSampler:
    return WindowTokenSampler(order(), lengths, limit, **options)


def test_batches_by_tokens_hold_every_example_once_and_keep_the_limit():
    lengths = LENGTHS.copy()
    lengths[[0, 5, 404, 1500]] = 0
    sampler = tokens(lengths)
    drawn, step = Counter(), 0
    while (draws := sampler.draws(step))[0][0] < 2:
        sizes = lengths[[example for _, example in draws]].max(axis=1)
        assert len(draws) * sizes.max() <= 131
        assert (np.diff(sizes) <= 0).all()
        drawn.update(draws)
        step += 1
    kept = set(range(len(lengths))) - {0, 5, 404, 1500}
    assert set(drawn.values()) == {1}
    assert set(drawn) == {(epoch, example) for epoch in (0, 1) for example in kept}
    assert [tokens(lengths).draws(number) for number in (step - 1, 2)] == [sampler.draws(step - 1), sampler.draws(2)]


def test_batches_by_tokens_stay_in_their_window():
    sampler, windows = tokens(), order()
    of_example = {
        int(example): number for number in range(windows.num_windows(0)) for example in windows.examples(0, number)
    }
    numbers = []
    step = 0
    while (draws := sampler.draws(step))[0][0] == 0:
        (number,) = {of_example[example] for _, example in draws}
        numbers.append(number)
        step += 1
    assert numbers == sorted(numbers)
    assert sampler.remarks()[1].startswith(f"batches by tokens: {step:,} batches an epoch")
    assert 0.5 < sampler.filled_share() < 1


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_processes_share_batches_by_tokens(processes):
    sampler = tokens(num_processes=processes, micro_batch_tokens=47)
    for step in (0, 11, 60):
        scored = [
            draw
            for rank in range(processes)
            for index in range(sampler.num_scored(step, rank))
            for draw in sampler.micro_draws(step, rank, index)
        ]
        assert sorted(scored) == sorted(tokens().draws(step))


def test_the_longest_are_found_without_all_in_memory(monkeypatch):
    monkeypatch.setattr("mmattn.training.window_sampler._AT_ONCE", 101)
    whole = TokenSampler(LENGTHS.astype(np.int64), 131)
    assert tokens().longest(5) == whole.longest(5)
    assert tokens().padded_tokens([3, 4]) == whole.padded_tokens([3, 4])
    assert tokens().lengths_checksum() == tokens().lengths_checksum() != tokens(LENGTHS + 1).lengths_checksum()


def test_what_does_not_fit_is_refused():
    with pytest.raises(DataError, match=r"training example \d+ has 22 tokens, more than training.batch_tokens 20 "):
        tokens(limit=20)
    with pytest.raises(DataError, match="more than training.micro_batch_tokens 21 "):
        tokens(micro_batch_tokens=21)
    with pytest.raises(DataError, match="no examples that can be used: all are left out"):
        tokens(np.zeros_like(LENGTHS))
    with pytest.raises(DataError, match="holds no examples"):
        WindowSampler(order(bounds=np.array([0])), 3)
    with pytest.raises(UsageError, match="batch_size 29 cannot be shared equally by 2 processes"):
        WindowSampler(order(), 29, 2)


def test_a_task_says_that_it_streams(tmp_path):
    task = ToyTask(num_examples=int(STARTS[-1]))
    task.stream = Layout(bounds())
    assert isinstance(make_sampler(task, toy_config(tmp_path)), WindowSampler)
    with pytest.raises(UsageError, match="ToyTask has no lengths: use batch_size"):
        make_sampler(task, toy_config(tmp_path, batch_tokens=70))
    task.groups = np.zeros(len(task), dtype=np.int64)
    with pytest.raises(UsageError, match="groups that cannot share a batch, which streamed data does not keep"):
        make_sampler(task, toy_config(tmp_path))
    ragged = RaggedTask(num_examples=int(STARTS[-1]))
    ragged.stream = Layout(bounds())
    assert isinstance(make_sampler(ragged, toy_config(tmp_path, batch_tokens=70)), WindowTokenSampler)
    ragged.stream = Layout(np.array([0, 5]))
    with pytest.raises(UsageError, match="RaggedTask has 1,523 examples, and its shards hold 5"):
        make_sampler(ragged, toy_config(tmp_path))


def test_changed_shards_are_named():
    names = [f"{number}.parquet" for number in range(9)]
    old = stream_facts(Layout(bounds(), shards=dict.fromkeys(names, "1")))
    assert stream_differences(old, old) == []
    assert stream_differences(None, None) == []
    assert stream_differences(None, old) == ["data.streaming: false -> true"]
    other = {**dict.fromkeys(names[2:], "1"), "8.parquet": "2", "new.parquet": "1"}
    assert stream_differences(old, stream_facts(Layout(bounds(), window=7, shards=other))) == [
        "data.window: 61 -> 7",
        "shard 0.parquet is gone",
        "shard 1.parquet is gone",
        "shard new.parquet is new",
        "shard 8.parquet has changed",
    ]
    many = stream_differences(old, stream_facts(Layout(bounds(), shards={})))
    assert len(many) == 6
    assert many[-1] == "and 4 shards more"
    turned = stream_facts(Layout(bounds(), shards=dict.fromkeys(reversed(names), "1")))
    assert stream_differences(old, turned) == ["the shards come in another order"]
