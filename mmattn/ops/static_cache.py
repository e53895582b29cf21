"""Self-attention keys and values in storage of a fixed size, for steps that are compiled or captured once.

Shapes: B contexts, n rows of each, G key/value heads, D head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor


class StaticKVCache:
    """A layer's self-attention cache for one step of static shape: storage of a fixed number of places, one of which
    the step's token takes; which one, and how many hold something, only the device knows.

    The storage is used as a ring: position p stands in place p modulo `capacity`.

    Args:
        storage: `[B, n, 2 * G, capacity, D]`, keys and then values of n rows for each of B contexts.
        position: int64 `[1]`, the token's position.
    """

    window = None  # `visible_places` has it: nothing is left to be cut off

    def __init__(self, storage: Tensor, position: Tensor) -> None:
        self.storage = storage
        self.position = position

    def update(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Put in key and value `[B * n, G, 1, D]`; returns views `[B * n, G, capacity, D]` of all places."""
        heads = key.shape[1]
        place = self.position % self.storage.shape[3]
        self.storage.index_copy_(3, place, torch.cat((key, value), dim=1).view(*self.storage.shape[:3], 1, -1))
        held = self.storage.flatten(0, 1)
        return held[:, :heads], held[:, heads:]


def visible_places(position: Tensor, window: Tensor, capacity: int) -> Tensor:
    """Boolean `[1, capacity]`: places of a `StaticKVCache` that a token at `position` may attend to, its own included.

    Args:
        position: int64 `[1]`.
        window: int64 `[1]`: so many last positions are seen, at most `capacity`.
        capacity: places of the ring.
    """
    age = (position - torch.arange(capacity, device=position.device)) % capacity
    return ((age <= position) & (age < window))[None]
