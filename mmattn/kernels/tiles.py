"""Cutting a size into blocks that Triton can hold: powers of two of at least 16, as few elements of padding as two
blocks allow. 40 becomes 32 + 16 where the next power of two would be 64, 77 becomes 64 + 16 instead of 128.
"""

from __future__ import annotations

import functools

MIN_TILE = 16

# (start, size) of each block. A tuple, because it is a compile-time constant of the kernels.
Tiles = tuple[tuple[int, int], ...]


@functools.cache
def tiles_of(size: int) -> Tiles:
    """At most two blocks that cover `size`, the larger first; only the last one may reach beyond it."""
    largest = MIN_TILE
    while largest * 2 <= size:
        largest *= 2
    rest = size - largest
    if rest <= 0:
        return ((0, largest),)
    second = MIN_TILE
    while second < rest:
        second *= 2
    if second == largest:
        return ((0, 2 * largest),)
    return ((0, largest), (largest, second))


def one_tile(size: int) -> Tiles:
    """The one block that covers `size`."""
    return ((0, max(MIN_TILE, power_of_two(size))),)


def padded(size: int) -> int:
    """What `size` takes up in blocks."""
    return sum(length for _, length in tiles_of(size))


def power_of_two(size: int) -> int:
    """The smallest power of two that is at least `size` and at least 1."""
    return 1 << max(0, size - 1).bit_length()


def tiles_up_to(largest: int, size: int) -> Tiles:
    """Blocks of `largest` as many as fit, and `tiles_of` what is left."""
    whole = size // largest * largest
    rest = tuple((whole + start, length) for start, length in tiles_of(size - whole)) if size > whole else ()
    return (*((start, largest) for start in range(0, whole, largest)), *rest)


def ceil_div(size: int, part: int) -> int:
    """How many parts it takes to cover `size`."""
    return -(-size // part)
