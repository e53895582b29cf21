"""Batches of examples that are streamed from shards: of equally many examples, or of about equally many tokens."""

from __future__ import annotations

import bisect
import functools
import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mmattn.errors import DataError, UsageError
from mmattn.training.config import TrainingConfig
from mmattn.training.sampler import EqualBatches, require_examples
from mmattn.training.task import Draw, StreamLayout, Task
from mmattn.training.token_sampler import TokenBatches, cut_sizes, require_lengths, sort_by_size
from mmattn.training.window_order import WindowOrder

_SHUFFLED_BATCHES = 4  # what random numbers of a window are for, beside those of `window_order`
_AT_ONCE = 1 << 20  # lengths looked at together: they stay on disk
_NAMED = 5  # shards that a message names one by one
_TRIED = 10  # windows that say how well batches are filled


@dataclass(frozen=True, eq=False)  # by identity, for it keys a cache
class WindowSampler(EqualBatches):
    """The order of `WindowOrder`, cut into batches of equally many examples, which may cross an epoch's end."""

    order: WindowOrder
    batch_size: int
    num_processes: int = 1
    micro_batch_size: int | None = None

    def __post_init__(self) -> None:
        """Raise when there is nothing to draw, or processes would get unequal shares."""
        require_examples(len(self.order))
        self.require_equal_shares()

    def draws(self, step: int) -> list[Draw]:
        """The draws of a step, over all processes."""
        position, end = step * self.batch_size, (step + 1) * self.batch_size
        draws: list[Draw] = []
        while position < end:
            epoch, place = divmod(position, len(self.order))
            window, first = self.order.find(epoch, place)
            examples = self.order.examples(epoch, window)[first : first + end - position]
            draws += [(epoch, example) for example in examples.tolist()]
            position += len(examples)
        return draws

    def remarks(self) -> list[str]:
        """What is shuffled."""
        return [_shuffled(self.order)]


@dataclass(frozen=True, eq=False)  # by identity, for it keys a cache
class WindowTokenSampler(TokenBatches):
    """The windows of `WindowOrder`, each sorted by length and cut into batches of at most `batch_tokens` padded tokens.

    A window's batches are shuffled by (seed, epoch, window); none crosses the window's end. Padded tokens, processes
    and micro-batches are as in `TokenSampler`.

    Where a step stands follows from the lengths alone. To find it the batches of all windows before are counted, a
    tenth of a second for a million examples, and no data is read.

    Attributes:
        order: The windows.
        lengths: Token counts, [num_examples, sides]; may be mapped from a file. An example with zeros is left out.
    """

    order: WindowOrder
    lengths: np.ndarray
    batch_tokens: int
    num_processes: int = 1
    micro_batch_tokens: int | None = None
    _first_steps: list[int] = field(init=False, repr=False, default_factory=lambda: [0])

    def __post_init__(self) -> None:
        """Raise when there is nothing to draw, or an example that alone is too long."""
        require_examples(len(self.order))
        if not any(sizes.any() for _, sizes in self._all_sizes()):
            raise DataError("the training data holds no examples that can be used: all are left out")
        longest = self.longest(1, by_side=True)[0]
        for key in ("batch_tokens", "micro_batch_tokens"):
            limit = getattr(self, key)
            if limit is not None:
                number = sum(int((sizes > limit).sum()) for _, sizes in self._all_sizes())
                self._require_fitting(key, limit, longest, number)

    def remarks(self) -> list[str]:
        """What is shuffled, how many batches the first epoch has, and how well they are filled."""
        return [
            _shuffled(self.order),
            f"batches by tokens: {_window_steps(self, 0)[-1]:,} batches an epoch, {self.filled_share():.0%} of the "
            "slots hold tokens; batch_size is not used",
        ]

    def lengths_checksum(self) -> str:
        """A fingerprint of `lengths`."""
        digest = hashlib.sha256(str(self.lengths.dtype).encode())
        for start in range(0, len(self.lengths), _AT_ONCE):
            digest.update(np.ascontiguousarray(self.lengths[start : start + _AT_ONCE]).data)
        return digest.hexdigest()

    def filled_share(self) -> float:
        """The share of padded slots, over all sides, that hold tokens, in the first windows."""
        held = slots = 0
        for number in range(min(_TRIED, self.order.num_windows(0))):
            examples, bounds = _batches(self, 0, number)
            for start, end in bounds:
                lengths = self.lengths[examples[start:end]]
                held += int(lengths.sum())
                slots += int((end - start) * lengths.max(axis=0).sum())
        return held / max(1, slots)

    def longest(self, number: int, *, by_side: bool = False) -> list[int]:
        """The examples with the most tokens over all sides, or on one side, [number]."""
        found, sums = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
        for start, sizes in self._all_sizes():
            counts = sizes if by_side else self.lengths[start : start + _AT_ONCE].sum(axis=1, dtype=np.int64)
            found = np.concatenate([found, np.arange(start, start + len(counts))])
            sums = np.concatenate([sums, counts])
            best = np.argsort(-sums, kind="stable")[:number]
            found, sums = found[best], sums[best]
        return found.tolist()

    def _all_sizes(self) -> Iterator[tuple[int, np.ndarray]]:
        for start in range(0, len(self.lengths), _AT_ONCE):
            yield start, np.asarray(self.lengths[start : start + _AT_ONCE]).max(axis=1)

    def _sizes_of(self, examples: np.ndarray) -> np.ndarray:
        return self.lengths[examples].max(axis=1)

    def _batch(self, step: int) -> tuple[int, np.ndarray]:
        firsts = self._first_steps  # of the epochs met so far, so that a step's epoch is known
        while firsts[-1] <= step:
            firsts.append(firsts[-1] + int(_window_steps(self, len(firsts) - 1)[-1]))
        epoch = bisect.bisect_right(firsts, step) - 1
        steps, place = _window_steps(self, epoch), step - firsts[epoch]
        window = int(np.searchsorted(steps, place, side="right")) - 1
        examples, bounds = _batches(self, epoch, window)
        start, end = bounds[place - int(steps[window])]
        return epoch, examples[start:end]


def make_window_sampler(
    task: Task, layout: StreamLayout, config: TrainingConfig, num_processes: int
) -> WindowSampler | WindowTokenSampler:
    """The sampler of a streamed task: by `config.batch_tokens` where that is set, else by `config.batch_size`.

    Raises:
        DataError: when there are no examples, or one is too long.
        UsageError: when the processes cannot share `batch_size`, the task has groups, or no lengths that are needed.
    """
    if task.groups is not None:
        raise UsageError(
            f"{type(task).__name__} puts its examples into groups that cannot share a batch, which streamed data does "
            "not keep: give all examples one shape, or do not stream"
        )
    order = WindowOrder(layout.bounds, layout.window, layout.blocks_at_once, config.seed)
    if len(order) != len(task):
        raise UsageError(f"{type(task).__name__} has {len(task):,} examples, and its shards hold {len(order):,}")
    if config.batch_tokens is None:
        return WindowSampler(order, config.batch_size, num_processes, config.micro_batch_size)
    lengths = require_lengths(task)
    return WindowTokenSampler(order, lengths, config.batch_tokens, num_processes, config.micro_batch_tokens)


def stream_facts(layout: StreamLayout | None) -> dict[str, Any] | None:
    """What a checkpoint keeps of streamed data, as JSON has it: its windows, and a fingerprint of each shard."""
    if layout is None:
        return None
    return {"window": layout.window, "blocks_at_once": layout.blocks_at_once, "shards": dict(layout.shards)}


def stream_differences(old: dict[str, Any] | None, new: dict[str, Any] | None) -> list[str]:
    """What differs between two `stream_facts`, shards by name; nothing where neither is streamed."""
    if old is None or new is None:
        return (
            [] if old == new else [f"data.streaming: {str(old is not None).lower()} -> {str(new is not None).lower()}"]
        )
    names = ("window", "blocks_at_once")
    changed = [f"data.{name}: {old[name]} -> {new[name]}" for name in names if old[name] != new[name]]
    before, now = old["shards"], new["shards"]
    shards = [f"shard {name} is gone" for name in before if name not in now]
    shards += [f"shard {name} is new" for name in now if name not in before]
    shards += [f"shard {name} has changed" for name in before if before[name] != now.get(name, before[name])]
    if not shards and list(before) != list(now):
        shards = ["the shards come in another order"]
    more = [f"and {len(shards) - _NAMED} shards more"] if len(shards) > _NAMED else []
    return [*changed, *shards[:_NAMED], *more]


def _shuffled(order: WindowOrder) -> str:
    return (
        f"streamed: {len(order):,} examples an epoch, each once, shuffled in {order.num_windows(0):,} windows of about "
        f"{order.window:,}, which mix up to {order.blocks_at_once} of {len(order.edges) - 1:,} blocks"
    )


@functools.lru_cache(maxsize=2)
def _window_steps(sampler: WindowTokenSampler, epoch: int) -> np.ndarray:
    """Steps of an epoch before each of its windows, int64 [windows + 1]."""
    counts = [0]
    for number in range(sampler.order.num_windows(epoch)):
        sizes = sampler._sizes_of(np.sort(sampler.order.examples(epoch, number)))
        counts.append(len(cut_sizes(-np.sort(-sizes[sizes > 0]), sampler.batch_tokens)) - 1)
    return np.cumsum(counts)


@functools.lru_cache(maxsize=4)
def _batches(sampler: WindowTokenSampler, epoch: int, window: int) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """A window's examples, sorted by length, and where its batches start and end in them, in the order of the steps."""
    examples = sampler.order.examples(epoch, window)
    examples = examples[sampler._sizes_of(examples) > 0]
    examples = sort_by_size(examples, sampler.lengths[examples])
    cuts = cut_sizes(sampler._sizes_of(examples), sampler.batch_tokens)
    bounds = list(itertools.pairwise(cuts))
    random = np.random.default_rng([sampler.order.seed, epoch, _SHUFFLED_BATCHES, window])
    return examples, [bounds[place] for place in random.permutation(len(bounds))]
