"""Exponential moving average of what is trained, in float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class ParameterAverage:
    """Average of parameters and of floating-point buffers (batch norm's statistics).

    `average += (1 - d) * (value - average)` with d = min(decay, (1 + n) / (10 + n)), where n counts the
    updates so far; the smaller decay at the start lets the average leave the initial values behind. Averages are
    float32, or float64 for float64 tensors.
    """

    def __init__(self, tensors: dict[str, Tensor], decay: float) -> None:
        self.tensors = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
        self.decay, self.updates = decay, 0
        self.averages = {name: _wide(tensor.detach()).clone() for name, tensor in self.tensors.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the tensors after an optimiser step."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        values = [_wide(tensor.detach()) for tensor in self.tensors.values()]
        torch._foreach_lerp_(list(self.averages.values()), values, 1 - decay)  # pyright: ignore[reportPrivateImportUsage]
        self.updates += 1

    @torch.no_grad()
    def restart(self) -> None:
        """Begin again from the tensors as they are now."""
        self.load({name: tensor.detach() for name, tensor in self.tensors.items()}, 0)

    @torch.no_grad()
    def load(self, averages: dict[str, Tensor], updates: int) -> None:
        """Put back the averages of a checkpoint."""
        for name, average in self.averages.items():
            average.copy_(averages[name])
        self.updates = updates


@contextmanager
def replaced(tensors: dict[str, Tensor], values: dict[str, Tensor]) -> Iterator[None]:
    """Inside, tensors hold the values of the same names; afterwards their own, bit for bit."""
    own = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    assign(tensors, values)
    try:
        yield
    finally:
        assign(tensors, own)


@torch.no_grad()
def assign(tensors: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    """Copy into tensors the values of the same names."""
    for name, tensor in tensors.items():
        tensor.copy_(values[name])


def _wide(value: Tensor) -> Tensor:
    return value if value.dtype == torch.float64 else value.float()
