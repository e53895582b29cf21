"""Random draws for data, as pure functions of what they are for.

Nothing here has state, so a batch is the same in any worker, on any rank, before and after a resume.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _digest(text: str, size: int) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=size).digest(), "little")


def draw_generator(seed: int, epoch: int, example: int, purpose: str) -> np.random.Generator:
    """A generator for one purpose on one example of one epoch: equal arguments, equal draws, on every machine."""
    return np.random.Generator(np.random.Philox(key=_digest(f"{seed}/{epoch}/{example}/{purpose}", 16)))


def uniform_rows(seed: int, purpose: str, examples: Sequence[int] | np.ndarray, count: int) -> np.ndarray:
    """Uniform numbers in [0, 1) for many examples at once; a row depends on its own example only.

    Args:
        seed: The data set's seed.
        purpose: What the numbers are for; other purposes get unrelated numbers.
        examples: N example numbers.
        count: Numbers per example. The first `n` numbers of a row do not depend on `count`.

    Returns:
        float64 [N, count].
    """
    key = np.uint64(_digest(f"{seed}/{purpose}", 8))
    rows = np.asarray(examples).astype(np.uint64)[:, None]
    columns = np.arange(1, count + 1, dtype=np.uint64)[None, :]
    with np.errstate(over="ignore"):
        bits = _mix(_mix(rows * _GOLDEN + key) + columns * _GOLDEN)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(state: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))
