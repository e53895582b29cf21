"""The order of examples that are read from shards while training: shuffled, and a pure function of (seed, epoch)."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import numpy as np

_BLOCKS, _EXAMPLES = 2, 3  # what random numbers of an epoch are for


@dataclass(frozen=True, eq=False)  # by identity, for it keys a cache
class WindowOrder:
    """Every example once an epoch, in windows that mix several places of the data.

    Examples that are read together (a row group, a run of lines) stay together in blocks of about
    `window / blocks_at_once` examples or more. An epoch shuffles the blocks by (seed, epoch) and takes up to
    `blocks_at_once` of them at a time. These are passed through side by side, each from its start to its end, in
    windows of about `window` examples, to which each gives its share; a window is shuffled by (seed, epoch, window).
    So examples that stand together in the data do not meet in a batch more often than chance has it, while a reader
    has no more than `blocks_at_once` blocks open. Nothing has state: any place of any epoch is found in constant time.

    Attributes:
        bounds: Where that which is read at once begins, int64 [units + 1], from 0 to the number of examples.
        window: Examples that are shuffled together, about.
        blocks_at_once: Blocks that a window takes from at most.
        seed: Of the shuffling.
    """

    bounds: np.ndarray
    window: int
    blocks_at_once: int
    seed: int = 0
    edges: np.ndarray = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Cut the units into blocks."""
        starts = np.asarray(self.bounds[:-1], dtype=np.int64)
        block = starts // max(1, -(-self.window // self.blocks_at_once))
        is_first = np.ones(len(starts), dtype=bool)
        is_first[1:] = block[1:] != block[:-1]
        edges = np.append(starts[is_first], np.int64(self.bounds[-1]))
        object.__setattr__(self, "edges", edges[np.append(np.diff(edges) > 0, True)])

    def __len__(self) -> int:
        return int(self.bounds[-1])

    def num_windows(self, epoch: int) -> int:
        """Windows of an epoch."""
        return int(_epoch(self, epoch).windows[-1])

    def find(self, epoch: int, place: int) -> tuple[int, int]:
        """The window that holds the `place`-th example of an epoch, and how many stand before it there."""
        plan = _epoch(self, epoch)
        group = int(np.searchsorted(plan.starts, place, side="right")) - 1
        sizes, count = plan.sizes(self, group), plan.num_windows(group)
        rest = place - int(plan.starts[group])
        window = rest * count // int(sizes.sum())  # exact but for rounding, once for each block
        while window + 1 < count and _before(sizes, window + 1, count) <= rest:
            window += 1
        while _before(sizes, window, count) > rest:
            window -= 1
        return int(plan.windows[group]) + window, rest - _before(sizes, window, count)

    def examples(self, epoch: int, window: int) -> np.ndarray:
        """The examples of a window in their order, int64."""
        return _window(self, epoch, window)


@dataclass(frozen=True, eq=False)
class _Epoch:
    """Which blocks are passed through together: `order[cuts[g]:cuts[g + 1]]`.

    Attributes:
        order: The blocks, shuffled.
        cuts: Where each group of blocks begins in `order`, [groups + 1].
        starts: Examples before each group, [groups + 1].
        windows: Windows before each group, [groups + 1].
    """

    order: np.ndarray
    cuts: np.ndarray
    starts: np.ndarray
    windows: np.ndarray

    def blocks(self, group: int) -> np.ndarray:
        return self.order[self.cuts[group] : self.cuts[group + 1]]

    def sizes(self, order: WindowOrder, group: int) -> np.ndarray:
        blocks = self.blocks(group)
        return order.edges[blocks + 1] - order.edges[blocks]

    def num_windows(self, group: int) -> int:
        return int(self.windows[group + 1] - self.windows[group])


@functools.lru_cache(maxsize=4)
def _epoch(order: WindowOrder, number: int) -> _Epoch:
    sizes = np.diff(order.edges)
    blocks = np.random.default_rng([order.seed, number, _BLOCKS]).permutation(len(sizes))
    groups = -(-len(blocks) // order.blocks_at_once)
    cuts = np.arange(groups + 1) * len(blocks) // groups  # alike, so that no few blocks are left for the end
    starts = np.append(0, np.cumsum(sizes[blocks]))[cuts]
    counts = np.maximum(1, (2 * np.diff(starts) + order.window) // (2 * order.window))
    return _Epoch(blocks, cuts, starts, np.append(0, np.cumsum(counts)))


def _before(sizes: np.ndarray, window: int, count: int) -> int:
    """Examples of a group of blocks that stand before one of its `count` windows."""
    return int((window * sizes // count).sum())


@functools.lru_cache(maxsize=4)
def _window(order: WindowOrder, epoch: int, number: int) -> np.ndarray:
    plan = _epoch(order, epoch)
    group = int(np.searchsorted(plan.windows, number, side="right")) - 1
    window, count = number - int(plan.windows[group]), plan.num_windows(group)
    starts, sizes = order.edges[plan.blocks(group)], plan.sizes(order, group)
    firsts, ends = (starts + (window + shift) * sizes // count for shift in (0, 1))
    examples = np.concatenate([np.arange(first, end) for first, end in zip(firsts, ends, strict=True)])
    return np.random.default_rng([order.seed, epoch, _EXAMPLES, number]).permutation(examples)
