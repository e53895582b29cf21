"""Batches of one group each: pure, complete over the epochs, and alike for any number of processes."""

from __future__ import annotations

import itertools
import pickle
from collections import Counter

import numpy as np
import pytest

from mmattn.errors import DataError, UsageError
from mmattn.training import train
from mmattn.training.batches import make_sampler, step_batches
from mmattn.training.group_sampler import GroupSampler
from tests.training.test_start import refuse
from tests.training.toy import RaggedTask, ToyTask, toy_config

GROUPS = np.random.default_rng(0).permutation(np.repeat([5, -2, 7, 11], [97, 41, 13, 3]))
BATCH = 12


class GroupedTask(ToyTask):
    """The toy, whose collate refuses what must not meet."""

    def __init__(self, **options):
        super().__init__(**options)
        self.groups = np.arange(len(self)) % 3

    def collate(self, draws):
        assert self.groups is not None
        assert len({int(self.groups[example]) for _, example in draws}) == 1
        return super().collate(draws)


def test_a_step_is_of_one_group_and_groups_come_as_often_as_they_are_large():
    sampler = GroupSampler(GROUPS, BATCH, seed=3)
    steps = 700
    drawn = Counter()
    for step in range(steps):
        draws = sampler.draws(step)
        (group,) = {int(GROUPS[example]) for _, example in draws}
        assert len(draws) == sampler.num_draws(step) == BATCH
        drawn[group] += BATCH
    for group, size in Counter(GROUPS.tolist()).items():
        assert drawn[group] == pytest.approx(steps * BATCH * size / len(GROUPS), abs=2 * BATCH)


def test_nothing_is_dropped_and_nothing_comes_twice_in_an_epoch():
    sampler = GroupSampler(GROUPS, BATCH, seed=3)
    draws = [draw for step in range(700) for draw in sampler.draws(step)]
    assert len(set(draws)) == len(draws)
    counts = Counter(example for _, example in draws)
    by_group = {
        group: {counts[example] for example in np.flatnonzero(group == GROUPS)} for group in set(GROUPS.tolist())
    }
    assert all(max(found) - min(found) <= 1 for found in by_group.values())
    epochs = {example: sorted(epoch for epoch, other in draws if other == example) for example in (0, 50, 150)}
    assert all(found == list(range(len(found))) for found in epochs.values())
    rounds = 700 * BATCH // len(GROUPS)
    assert all(abs(min(found) - rounds) <= 1 + BATCH // 3 for found in by_group.values())


def test_a_step_is_a_function_of_seed_and_step():
    straight = [GroupSampler(GROUPS, BATCH, 5).draws(step) for step in range(120)]
    for processes, micro in ((1, None), (2, 5), (3, 1), (4, 3)):
        sampler = GroupSampler(GROUPS, BATCH, 5, processes, micro)
        for step in (119, 0, 60, 7):
            assert sampler.draws(step) == straight[step]
            indices = range(sampler.num_micro_batches(step))
            parts = [sampler.micro_draws(step, rank, index) for rank in range(processes) for index in indices]
            assert all(parts)
            assert sorted(draw for part in parts for draw in part) == sorted(straight[step])
        assert pickle.loads(pickle.dumps(sampler)).draws(88) == straight[88]
    assert GroupSampler(GROUPS, BATCH, 6).draws(3) != straight[3]


def test_the_order_of_groups_is_mixed_and_differs_by_epoch():
    sampler = GroupSampler(np.repeat([0, 1], [120, 120]), BATCH)
    groups = [sampler.draws(step)[0][1] >= 120 for step in range(60)]
    assert [sum(groups[start : start + 20]) for start in (0, 20, 40)] == [10, 10, 10]
    assert groups[:20] != groups[20:40]
    assert 3 < sum(one != other for one, other in itertools.pairwise(groups)) < 56


def test_groups_smaller_than_a_batch_wait_for_later_epochs():
    sampler = GroupSampler(np.array([0, 1, 1]), 4)
    draws = [draw for step in range(9) for draw in sampler.draws(step)]
    assert Counter(example for _, example in draws) == {0: 12, 1: 12, 2: 12}


def test_what_cannot_be_used(tmp_path):
    with pytest.raises(UsageError, match="batch_size 7 cannot be shared equally by 2 processes"):
        GroupSampler(GROUPS, 7, num_processes=2)
    with pytest.raises(DataError, match="no examples"):
        GroupSampler(GROUPS[:0], 7)
    task = GroupedTask()
    with pytest.raises(
        UsageError, match=r"^GroupedTask puts its examples into groups .* use batch_size, with batch_tok"
    ):
        make_sampler(task, toy_config(tmp_path, batch_tokens=9))
    for groups in (np.zeros(22, dtype=int), np.zeros(23), np.zeros((23, 1), dtype=int)):
        task.groups = groups
        with pytest.raises(UsageError, match=r"GroupedTask\.groups must be integers of shape \(23,\), not "):
            make_sampler(task, toy_config(tmp_path))
    assert make_sampler(RaggedTask(), toy_config(tmp_path)).lengths_checksum() is None


@pytest.mark.parametrize("num_workers", [0, 2])
def test_workers_give_the_same_batches(num_workers):
    task = GroupedTask()
    sampler = make_sampler(task, toy_config("x", micro_batch_size=4))
    steps = list(step_batches(task, sampler, rank=0, first_step=3, last_step=9, num_workers=num_workers))
    for step, batches in enumerate(steps, start=3):
        assert [len(batch["labels"]) for batch in batches] == [4, 2]
        for index, batch in enumerate(batches):
            assert batch["labels"].equal(task.collate(sampler.micro_draws(step, 0, index))["labels"])


def test_a_run_in_groups_resumes_exactly_and_not_with_other_groups(tmp_path, capsys):
    train(GroupedTask(), toy_config(tmp_path / "parts", max_steps=5, schedule="constant"))
    assert "batches of one group each: 3 groups of 7 to 8 examples; what does not fill" in capsys.readouterr().err
    straight = train(GroupedTask(), toy_config(tmp_path / "straight", max_steps=12, schedule="constant"))
    parts = toy_config(tmp_path / "parts", max_steps=12, schedule="constant")
    task = GroupedTask()
    task.groups = np.roll(task.groups, 1)
    message = r"cannot resume .* \(lengths_checksum: groups \w+ -> groups \w+\): restore them, or start a new run"
    refuse(message, parts, task, resume=True)
    refuse(r"\(lengths_checksum: groups \w+ -> None\)", parts, ToyTask(), resume=True)
    assert train(GroupedTask(), parts, resume=True).losses == straight.losses[5:]
