"""Which examples a step sees: a pure function of (seed, step), so that a resumed run cannot lose its place."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset, Sampler

from mmattn.errors import DataError, MmattnError, UsageError
from mmattn.training.signals import ignore_stop_signals
from mmattn.training.task import Batch, Draw, Task


@dataclass(frozen=True)
class StepSampler:
    """The draws of each step: epochs of permutations by (seed, epoch), cut into batches that may cross an epoch's end.

    Step numbers start at 0. Within a step, process r of n takes every n-th draw from r on, cut into micro-batches.
    """

    num_examples: int
    batch_size: int
    seed: int = 0
    num_processes: int = 1
    micro_batch_size: int | None = None

    def __post_init__(self) -> None:
        """Raise when there is nothing to draw, or processes would get unequal shares."""
        if self.num_examples < 1:
            raise DataError("the training data holds no examples")
        if self.batch_size % self.num_processes:
            raise UsageError(
                f"batch_size {self.batch_size} cannot be shared equally by {self.num_processes} processes: "
                "make it a multiple"
            )

    @property
    def micro_batches(self) -> int:
        """Micro-batches of a process in one step."""
        share = self.batch_size // self.num_processes
        return -(-share // (self.micro_batch_size or share))

    def draws(self, step: int) -> list[Draw]:
        """The draws of a step, over all processes."""
        positions = range(step * self.batch_size, (step + 1) * self.batch_size)
        places = [divmod(position, self.num_examples) for position in positions]
        return [(epoch, int(_permutation(self.num_examples, self.seed, epoch)[place])) for epoch, place in places]

    def micro_draws(self, step: int, rank: int, index: int) -> list[Draw]:
        """The draws of one micro-batch of one process."""
        share = self.draws(step)[rank :: self.num_processes]
        size = self.micro_batch_size or len(share)
        return share[index * size : (index + 1) * size]


@functools.lru_cache(maxsize=2)
def _permutation(num_examples: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(num_examples)


Key = tuple[int, int]


class _MicroBatches(Dataset[Any]):
    """Micro-batches by (step, index). An expected failure is handed over as a value, to keep its one-line message."""

    def __init__(self, task: Task, sampler: StepSampler, rank: int) -> None:
        self.task, self.sampler, self.rank = task, sampler, rank

    def __getitem__(self, key: Key) -> Batch | MmattnError:
        try:
            return self.task.collate(self.sampler.micro_draws(key[0], self.rank, key[1]))
        except MmattnError as error:
            return error


class _Keys(Sampler[Key]):
    def __init__(self, first_step: int, last_step: int, micro_batches: int) -> None:
        self.steps, self.micro_batches = range(first_step, last_step), micro_batches

    def __iter__(self) -> Iterator[Key]:
        return ((step, index) for step in self.steps for index in range(self.micro_batches))

    def __len__(self) -> int:
        return len(self.steps) * self.micro_batches


def step_batches(
    task: Task,
    sampler: StepSampler,
    *,
    rank: int,
    first_step: int,
    last_step: int,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> Iterator[Sequence[Batch]]:
    """Yield the micro-batches of a process, step by step from `first_step` up to but not `last_step`.

    Workers only prefetch: what a step holds does not depend on their number.

    Raises:
        MmattnError: what `Task.collate` raised, in a worker too.
    """
    loader = DataLoader(
        _MicroBatches(task, sampler, rank),
        batch_size=None,
        sampler=_Keys(first_step, last_step, sampler.micro_batches),
        num_workers=num_workers,
        pin_memory=pin_memory,
        worker_init_fn=ignore_stop_signals,
    )
    batches: list[Batch] = []
    for batch in loader:
        if isinstance(batch, MmattnError):
            raise batch
        batches.append(batch)
        if len(batches) == sampler.micro_batches:
            yield batches
            batches = []
