"""Batches whose examples are all of one group, such as pictures of one size."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass, field

import numpy as np

from mmattn.errors import UsageError
from mmattn.training.sampler import EqualBatches, require_examples
from mmattn.training.task import Draw, Task


@dataclass(frozen=True, eq=False)  # by identity, for it keys a cache
class GroupSampler(EqualBatches):
    """Batches of equally many examples of one group each.

    A group's examples form an endless sequence, epoch after epoch in an order by (seed, epoch, group), and its batches
    are cut from that one after another. So what does not fill a batch at an epoch's end waits for the next epoch:
    nothing is dropped, nothing is drawn twice an epoch, and groups come as often as they are large. In round r the run
    takes, in an order by (seed, r), every batch that is complete once each example has been drawn r + 1 times.

    Attributes:
        groups: Group of each example, int64 [num_examples], from `example_groups`.
    """

    groups: np.ndarray
    batch_size: int
    seed: int = 0
    num_processes: int = 1
    micro_batch_size: int | None = None
    _members: list[np.ndarray] = field(init=False, repr=False)
    _sizes: np.ndarray = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Raise when there is nothing to draw, or processes would get unequal shares."""
        require_examples(len(self.groups))
        self.require_equal_shares()
        order = np.argsort(self.groups, kind="stable")
        _, starts = np.unique(self.groups[order], return_index=True)
        object.__setattr__(self, "_members", np.split(order, starts[1:]))
        object.__setattr__(self, "_sizes", np.array([len(members) for members in self._members]))

    def draws(self, step: int) -> list[Draw]:
        """The draws of a step, over all processes."""
        group, number = self._batch(step)
        members = self._members[group]
        positions = range(number * self.batch_size, (number + 1) * self.batch_size)
        places = [divmod(position, len(members)) for position in positions]
        return [(epoch, int(members[_order(len(members), self.seed, epoch, group)[place]])) for epoch, place in places]

    def remarks(self) -> list[str]:
        """How many groups there are."""
        largest, smallest = int(self._sizes.max()), int(self._sizes.min())
        return [
            f"batches of one group each: {len(self._sizes):,} groups of {smallest:,} to {largest:,} examples; what "
            "does not fill a batch waits for the next epoch"
        ]

    def lengths_checksum(self) -> str:
        """A fingerprint of `groups`."""
        return "groups " + hashlib.sha256(np.ascontiguousarray(self.groups).data).hexdigest()

    def _finished(self, rounds: int) -> np.ndarray:
        """Complete batches of each group after so many rounds, [groups]."""
        return rounds * self._sizes // self.batch_size

    def _batch(self, step: int) -> tuple[int, int]:
        """Which group a step is of, and which of that group's batches it is."""
        low, high = 0, 1
        while self._finished(high).sum() <= step:
            low, high = high, 2 * high
        while high - low > 1:  # the last round that starts at or before the step
            middle = (low + high) // 2
            low, high = (middle, high) if self._finished(middle).sum() <= step else (low, middle)
        before = self._finished(low)
        entry = _round(self, low)[step - int(before.sum())]
        group = int(np.searchsorted(np.cumsum(self._finished(low + 1) - before), entry, side="right"))
        return group, int(before[group] + entry - (self._finished(low + 1) - before)[:group].sum())


@functools.lru_cache(maxsize=2)
def _round(sampler: GroupSampler, number: int) -> np.ndarray:
    """The order of a round's batches, which are numbered group by group."""
    total = int((sampler._finished(number + 1) - sampler._finished(number)).sum())
    return np.random.default_rng([sampler.seed, number, 1]).permutation(total)


@functools.lru_cache(maxsize=256)
def _order(size: int, seed: int, epoch: int, group: int) -> np.ndarray:
    """The order of a group's examples in an epoch, [size]."""
    return np.random.default_rng([seed, epoch, group, 2]).permutation(size)


def example_groups(task: Task) -> np.ndarray | None:
    """The groups of a task's examples, int64 [num_examples]; None where it has none.

    Raises:
        UsageError: when they are not what `Task.groups` asks for.
    """
    if task.groups is None:
        return None
    groups = np.asarray(task.groups)
    if groups.shape != (len(task),) or not np.issubdtype(groups.dtype, np.integer):
        raise UsageError(
            f"{type(task).__name__}.groups must be integers of shape ({len(task)},), not {groups.dtype} of shape "
            f"{groups.shape}"
        )
    return groups.astype(np.int64)
