from __future__ import annotations

import pytest

from mmattn.errors import DataError, UsageError
from mmattn.training.batches import step_batches
from mmattn.training.sampler import ExampleSampler
from tests.training.toy import ToyTask


def test_an_epoch_sees_each_example_once_and_batches_cross_its_end():
    sampler = ExampleSampler(num_examples=7, batch_size=3, seed=2)
    draws = [draw for step in range(7) for draw in sampler.draws(step)]
    for epoch in range(3):
        assert sorted(example for at, example in draws if at == epoch) == list(range(7))
    orders = [[example for at, example in draws if at == epoch] for epoch in range(3)]
    assert orders[0] != orders[1]
    assert sampler.draws(5) == ExampleSampler(num_examples=7, batch_size=3, seed=2).draws(5)
    assert sampler.draws(5) != ExampleSampler(num_examples=7, batch_size=3, seed=3).draws(5)


@pytest.mark.parametrize(("processes", "micro"), [(1, None), (1, 5), (2, 2), (3, 1), (4, 3)])
def test_processes_and_micro_batches_share_a_step(processes, micro):
    sampler = ExampleSampler(31, 12, 0, processes, micro)
    indices = range(sampler.num_micro_batches(4))
    parts = [sampler.micro_draws(4, rank, index) for rank in range(processes) for index in indices]
    assert all(parts)
    assert sorted(draw for part in parts for draw in part) == sorted(ExampleSampler(31, 12).draws(4))


def test_what_cannot_be_shared_is_refused():
    with pytest.raises(UsageError, match="batch_size 7 cannot be shared equally by 2 processes"):
        ExampleSampler(10, 7, num_processes=2)
    with pytest.raises(DataError, match="no examples"):
        ExampleSampler(0, 7)


def test_a_task_travels_to_workers_without_its_model():
    assert "model" not in ToyTask().__getstate__()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_expected_failure_in_a_worker_keeps_its_line(num_workers):
    class Broken(ToyTask):
        def collate(self, draws):
            raise DataError("cat.png is not a picture")

    batches = step_batches(Broken(), ExampleSampler(5, 2), rank=0, first_step=0, last_step=3, num_workers=num_workers)
    with pytest.raises(DataError, match=r"^cat\.png is not a picture$"):
        next(batches)
