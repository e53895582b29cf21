"""Which examples a step sees: a pure function of (seed, step), so that a resumed run cannot lose its place."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np

from mmattn.errors import DataError, UsageError
from mmattn.training.task import Draw


class StepSampler(ABC):
    """The draws of each step, shared out to processes and micro-batches. Step numbers start at 0.

    What a step draws depends on neither the number of processes nor the micro-batches, and no draw is in two of them.
    All processes take the same number of micro-batches in a step, for they exchange gradients in the last one. A
    process whose share is too small for that takes fill-ins: draws of the step once more, which count for nothing.
    """

    @abstractmethod
    def draws(self, step: int) -> list[Draw]:
        """The draws of a step, over all processes."""

    @abstractmethod
    def num_draws(self, step: int) -> int:
        """How many draws a step has, over all processes."""

    @abstractmethod
    def num_micro_batches(self, step: int) -> int:
        """Micro-batches of every process in a step."""

    @abstractmethod
    def num_scored(self, step: int, rank: int) -> int:
        """How many of these, from the first on, hold draws of a process's own; the others are fill-ins."""

    @abstractmethod
    def micro_draws(self, step: int, rank: int, index: int) -> list[Draw]:
        """The draws of one micro-batch of one process."""

    @abstractmethod
    def describe(self) -> str:
        """The batch in a few words for the log, such as `batch of 32 over 2 processes`."""

    def lengths_checksum(self) -> str | None:
        """A fingerprint of the examples' lengths, or groups, where the draws depend on them."""
        return None

    def remarks(self) -> list[str]:
        """Further lines for the log."""
        return []


class EqualBatches(StepSampler):
    """Steps of equally many examples. Process r of n takes every n-th draw from r on, cut into micro-batches."""

    batch_size: int
    num_processes: int
    micro_batch_size: int | None

    def require_equal_shares(self) -> None:
        """Raise `UsageError` when processes would get unequal shares."""
        if self.batch_size % self.num_processes:
            raise UsageError(
                f"batch_size {self.batch_size} cannot be shared equally by {self.num_processes} processes: "
                "make it a multiple"
            )

    def num_draws(self, step: int) -> int:
        """`batch_size`."""
        return self.batch_size

    def num_micro_batches(self, step: int) -> int:
        """The same in every step."""
        share = self.batch_size // self.num_processes
        return -(-share // (self.micro_batch_size or share))

    def num_scored(self, step: int, rank: int) -> int:
        """All of them, for the shares are equal."""
        return self.num_micro_batches(step)

    def micro_draws(self, step: int, rank: int, index: int) -> list[Draw]:
        """The draws of one micro-batch of one process."""
        share = _share(self, step, rank)
        size = self.micro_batch_size or len(share)
        return share[index * size : (index + 1) * size]

    def describe(self) -> str:
        """The batch in a few words for the log."""
        text = f"batch of {self.batch_size}{over_processes(self.num_processes)}"
        count = self.num_micro_batches(0)
        return text if count == 1 else f"{text} in {count} micro-batches of up to {self.micro_batch_size}"


@functools.lru_cache(maxsize=2)  # a step may have a thousand micro-batches
def _share(sampler: EqualBatches, step: int, rank: int) -> list[Draw]:
    return sampler.draws(step)[rank :: sampler.num_processes]


@dataclass(frozen=True)
class ExampleSampler(EqualBatches):
    """Permutations by (seed, epoch), cut into batches of equally many examples, which may cross an epoch's end."""

    num_examples: int
    batch_size: int
    seed: int = 0
    num_processes: int = 1
    micro_batch_size: int | None = None

    def __post_init__(self) -> None:
        """Raise when there is nothing to draw, or processes would get unequal shares."""
        require_examples(self.num_examples)
        self.require_equal_shares()

    def draws(self, step: int) -> list[Draw]:
        """The draws of a step, over all processes."""
        positions = range(step * self.batch_size, (step + 1) * self.batch_size)
        places = [divmod(position, self.num_examples) for position in positions]
        return [(epoch, int(permutation(self.num_examples, self.seed, epoch)[place])) for epoch, place in places]


def over_processes(num_processes: int) -> str:
    """` over n processes`, or nothing for one."""
    return f" over {num_processes} processes" if num_processes > 1 else ""


def require_examples(num_examples: int) -> None:
    """Raise `DataError` when there are none."""
    if num_examples < 1:
        raise DataError("the training data holds no examples")


@functools.lru_cache(maxsize=2)
def permutation(num_examples: int, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch, [num_examples]."""
    return np.random.default_rng([seed, epoch]).permutation(num_examples)
