"""Batches of about equally many tokens, of examples of like length.

Length is the reason why batches of equally many examples waste work: all are padded to the longest. Sorting within
windows of a shuffled epoch is Marian's `maxi-batch`; the bound on the padded size is fairseq's `max-tokens`.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
from abc import abstractmethod
from dataclasses import dataclass, field

import numpy as np

from mmattn.errors import DataError, UsageError
from mmattn.training.sampler import StepSampler, over_processes, permutation, require_examples
from mmattn.training.task import Draw, Task

WINDOW_BATCHES = 100  # Marian's default too: larger windows pad less and mix less


class TokenBatches(StepSampler):
    """Steps of examples of like length, longest first, shared out to processes and micro-batches.

    Within a step, process r of n takes every n-th draw from r on, cut into micro-batches of at most
    `micro_batch_tokens` padded tokens, or none where that is None. The cuts are those that the first process needs,
    whose draws are the longest; where another has no draw left for the last of them, it takes a fill-in.
    """

    batch_tokens: int
    num_processes: int
    micro_batch_tokens: int | None

    @abstractmethod
    def _batch(self, step: int) -> tuple[int, np.ndarray]:
        """The epoch of a step, and its examples, longest first."""

    @abstractmethod
    def _sizes_of(self, examples: np.ndarray) -> np.ndarray:
        """The tokens of examples on the side where they have most."""

    @abstractmethod
    def longest(self, number: int) -> list[int]:
        """The examples with the most tokens over all sides, [number]."""

    def draws(self, step: int) -> list[Draw]:
        """The draws of a step, over all processes, longest first."""
        epoch, examples = self._batch(step)
        return [(epoch, example) for example in examples.tolist()]

    def num_draws(self, step: int) -> int:
        """How many draws a step has, over all processes."""
        return len(self._batch(step)[1])

    def num_micro_batches(self, step: int) -> int:
        """As many as the first process needs."""
        return len(self._cuts(step)) - 1

    def num_scored(self, step: int, rank: int) -> int:
        """All, or all but the last, or none where a step has fewer draws than there are processes."""
        cuts, share = self._cuts(step), len(self._batch(step)[1][rank :: self.num_processes])
        return sum(start < share for start in cuts[:-1])

    def micro_draws(self, step: int, rank: int, index: int) -> list[Draw]:
        """The draws of one micro-batch of one process; a fill-in is the step's shortest draw."""
        cuts, draws = self._cuts(step), self.draws(step)
        return draws[rank :: self.num_processes][cuts[index] : cuts[index + 1]] or draws[-1:]

    def describe(self) -> str:
        """The batch in a few words for the log."""
        text = f"batches of up to {self.batch_tokens:,} tokens{over_processes(self.num_processes)}"
        micro = self.micro_batch_tokens
        return text if micro is None else f"{text} in micro-batches of up to {micro:,}"

    @property
    def micro_limit(self) -> int:
        """Padded tokens of the largest micro-batch that one process can meet."""
        return min(self.batch_tokens, self.micro_batch_tokens or self.batch_tokens)

    def padded_tokens(self, examples: list[int]) -> int:
        """Padded tokens of a batch of these examples."""
        return len(examples) * int(self._sizes_of(np.array(examples)).max())

    def _cuts(self, step: int) -> list[int]:
        # Of sorted shares the first is the longest at every place, so its cuts keep the limit in the others too.
        sizes = self._sizes_of(self._batch(step)[1][:: self.num_processes])
        return cut_sizes(sizes, self.micro_batch_tokens or int(sizes[0]) * len(sizes))

    def _require_fitting(self, key: str, limit: int, longest: int, number: int) -> None:
        """Raise `DataError` where `number` examples, of which `longest` is the longest, have more than `limit`."""
        if number:
            others = f", and {number - 1:,} others are too long" if number > 1 else ""
            raise DataError(
                f"training example {longest} has {self._sizes_of(np.array([longest]))[0]:,} tokens, more than "
                f"training.{key} {limit:,} allows{others}: raise {key}, or shorten or leave out such examples"
            )


@dataclass(frozen=True, eq=False)  # by identity, for it keys a cache
class TokenSampler(TokenBatches):
    """Batches of at most `batch_tokens` padded tokens, over all processes and micro-batches.

    A batch's padded tokens are its examples times the longest of them, on the side (source, target) where that is
    most. Each epoch is a permutation by (seed, epoch), cut into windows of about `WINDOW_BATCHES` batches. A window is
    sorted, longest first, and cut from the front into batches as large as `batch_tokens` allows; the epoch's batches
    are then shuffled by (seed, epoch). Every example is drawn once an epoch, and no batch crosses an epoch's end.

    Attributes:
        lengths: Token counts, [num_examples, sides], from `token_lengths`.
    """

    lengths: np.ndarray
    batch_tokens: int
    seed: int = 0
    num_processes: int = 1
    micro_batch_tokens: int | None = None
    _sizes: np.ndarray = field(init=False, repr=False)
    _first_steps: list[int] = field(init=False, repr=False, default_factory=lambda: [0])

    def __post_init__(self) -> None:
        """Raise when there is nothing to draw, or an example that alone is too long."""
        require_examples(len(self.lengths))
        # The side that is padded most is that of the longest example, so an example's largest side is its size.
        object.__setattr__(self, "_sizes", np.maximum(self.lengths.max(axis=1), 1))
        for key in ("batch_tokens", "micro_batch_tokens"):
            limit = getattr(self, key)
            if limit is not None:
                self._require_fitting(key, limit, int(self._sizes.argmax()), int((self._sizes > limit).sum()))

    @property
    def window(self) -> int:
        """How many examples are sorted together: as many as fill about `WINDOW_BATCHES` batches."""
        return max(1, WINDOW_BATCHES * self.batch_tokens * len(self._sizes) // int(self._sizes.sum()))

    def remarks(self) -> list[str]:
        """How many batches the first epoch has, and how well they are filled."""
        return [
            f"batches by tokens: {len(_epoch(self, 0).starts):,} batches an epoch, {self.filled_share():.0%} of the "
            "slots hold tokens; batch_size is not used"
        ]

    def lengths_checksum(self) -> str:
        """A fingerprint of `lengths`."""
        return hashlib.sha256(np.ascontiguousarray(self.lengths).data).hexdigest()

    def filled_share(self) -> float:
        """The share of the first epoch's padded slots, over all sides, that hold tokens."""
        epoch = _epoch(self, 0)
        order = np.argsort(epoch.starts)
        starts, ends = epoch.starts[order], epoch.ends[order]
        longest = np.maximum.reduceat(self.lengths[epoch.examples], starts)
        return float(self.lengths.sum() / max(1, ((ends - starts)[:, None] * longest).sum()))

    def longest(self, number: int) -> list[int]:
        """The examples with the most tokens over all sides, [number]."""
        return np.argsort(-self.lengths.sum(axis=1), kind="stable")[:number].tolist()

    def _sizes_of(self, examples: np.ndarray) -> np.ndarray:
        return self._sizes[examples]

    def _batch(self, step: int) -> tuple[int, np.ndarray]:
        firsts = self._first_steps  # of the epochs met so far, so that a step's epoch is known
        while firsts[-1] <= step:
            firsts.append(firsts[-1] + _num_batches(self, len(firsts) - 1))
        number = bisect.bisect_right(firsts, step) - 1
        epoch, place = _epoch(self, number), step - firsts[number]
        return number, epoch.examples[epoch.starts[place] : epoch.ends[place]]


@dataclass(frozen=True)
class _Epoch:
    """The batches of an epoch in the order of its steps: `examples[starts[i]:ends[i]]`."""

    examples: np.ndarray
    starts: np.ndarray
    ends: np.ndarray


@functools.lru_cache(maxsize=2)
def _epoch(sampler: TokenSampler, number: int) -> _Epoch:
    shuffled = permutation(len(sampler.lengths), sampler.seed, number)
    size = sampler.window
    windows, bounds = [], [0]
    for start in range(0, len(shuffled), size):
        window = shuffled[start : start + size]
        window = sort_by_size(window, sampler.lengths[window])
        bounds += [start + cut for cut in cut_sizes(sampler._sizes[window], sampler.batch_tokens)[1:]]
        windows.append(window)
    order = np.random.default_rng([sampler.seed, number, 1]).permutation(len(bounds) - 1)
    ends = np.array(bounds)
    return _Epoch(np.concatenate(windows), ends[:-1][order], ends[1:][order])


def _num_batches(sampler: TokenSampler, number: int) -> int:
    """As many as `_epoch` makes, in a fifth of the time: a resumed run counts those of all epochs before."""
    sizes, window = sampler._sizes[permutation(len(sampler.lengths), sampler.seed, number)], sampler.window
    windows = (sizes[start : start + window] for start in range(0, len(sizes), window))
    return sum(len(cut_sizes(-np.sort(-each), sampler.batch_tokens)) - 1 for each in windows)


def sort_by_size(examples: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Examples, longest first, by their token counts [num_examples, sides]."""
    # Of equal size, those of like sides stand together. lexsort is stable: the rest stays shuffled.
    lengths = np.asarray(lengths, dtype=np.int64)
    return examples[np.lexsort((*-lengths.T[::-1], -np.maximum(lengths.max(axis=1), 1)))]


def cut_sizes(sizes: np.ndarray, limit: int) -> list[int]:
    """Cut sizes that fall into pieces of at most `limit` as length times largest; the bounds, from 0 to the end."""
    bounds = [0]
    while bounds[-1] < len(sizes):
        bounds.append(min(len(sizes), bounds[-1] + limit // int(sizes[bounds[-1]])))
    return bounds


def token_lengths(task: Task) -> np.ndarray:
    """The token counts of a task's examples, [num_examples, sides], as int64; raises as `require_lengths`."""
    return require_lengths(task).astype(np.int64)


def require_lengths(task: Task) -> np.ndarray:
    """The token counts of a task's examples, [num_examples, sides], where and as they are.

    Raises:
        UsageError: when the task has none, or they are not what `Task.lengths` asks for.
    """
    name = type(task).__name__
    if task.lengths is None:
        raise UsageError(
            f"training.batch_tokens needs the token count of every example, and {name} has no lengths: "
            "use batch_size, with batch_tokens null"
        )
    lengths = np.asarray(task.lengths)
    has_shape = lengths.ndim in (1, 2) and len(lengths) == len(task) and 0 not in lengths.shape[1:]
    if not has_shape or not np.issubdtype(lengths.dtype, np.integer):
        raise UsageError(
            f"{name}.lengths must be integers of shape ({len(task)},) or ({len(task)}, sides), not "
            f"{lengths.dtype} of shape {lengths.shape}"
        )
    lengths = lengths[:, None] if lengths.ndim == 1 else lengths
    if lengths.size and lengths.min() < 0:
        example = int(lengths.min(axis=1).argmin())
        raise UsageError(f"{name}.lengths must not be negative: example {example} has {lengths[example].min()}")
    return lengths
