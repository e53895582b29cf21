"""What a recipe gives the loop: examples to a batch, a batch to a loss, a model to a score and to a folder."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL.Image import Image
from torch import Tensor, nn

Draw = tuple[int, int]
"""(epoch, example): all that decides what an example looks like, since every random draw is made from it and a seed."""

Batch = dict[str, Any]


@dataclass(frozen=True)
class Loss:
    """The loss of one micro-batch, as sums, so that micro-batches and processes add up exactly.

    Attributes:
        total: Sum of the losses of the scored tokens (or pixels, or pairs), a scalar with gradient.
        count: How many were scored: the same number as `Task.count(batch)`.
        parts: Further losses to log, each a (sum, count) pair. Every micro-batch names the same parts, with count 0
            where it has none.
    """

    total: Tensor
    count: int
    parts: Mapping[str, tuple[Tensor, int]] = field(default_factory=dict)


class StreamLayout(Protocol):
    """How examples lie in shards that are read while training: what decides their order besides the seed."""

    @property
    def bounds(self) -> np.ndarray:
        """Where that which is read at once begins, int64 [units + 1], from 0 to the number of examples."""
        ...

    @property
    def window(self) -> int:
        """Examples that are shuffled together, about."""
        ...

    @property
    def blocks_at_once(self) -> int:
        """How many runs of neighbouring examples a window mixes at most."""
        ...

    @property
    def shards(self) -> Mapping[str, str]:
        """The shards by name, in their order, with a fingerprint of what each holds."""
        ...


class Task(ABC):
    """One training task. Only parameters with `requires_grad` are trained.

    Attributes:
        model: What is trained, as one module. `loss` receives it wrapped for the run (DDP, autocast), or a sharded
            copy, and has to go through the `forward` of what it receives; the other methods receive this one.
        free_settings: Patterns of the recipe's settings that a resumed run may change, as `recipe_settings` reads them;
            all others have to be what they were.
        best: The metric of `evaluate` that chooses the best checkpoint; None keeps no best.
        is_higher_better: Whether a larger `best` metric is better.
        unit: What `count` counts, for the log.
        lengths: Token counts of the examples as `collate` makes them, special tokens included: integers of shape
            [num_examples], or [num_examples, sides] where several sequences are padded apart, such as source and
            target. Upper bounds where they depend on the epoch. Needed for `TrainingConfig.batch_tokens` only.
        groups: Which group each example is in, integers of shape [num_examples], where examples of different groups
            cannot share a batch (pictures of several sizes): all examples of a step are then of one group. None where
            any examples can.
        repeated_layers: Classes of the layers that the model repeats. Each such layer is sharded by itself, and with
            `TrainingConfig.activation_checkpointing` computed anew in the backward pass. All of its parameters have to
            be used through its `forward`.
        not_for_workers: Attributes that data workers do without: what is not needed by `collate`.
        stream: How the examples lie, where they are read from shards while training: their order is then that of
            `window_order.WindowOrder`. `lengths` may then be mapped from a file; an example with zeros is left out.
    """

    model: nn.Module
    free_settings: tuple[str, ...] = ()
    best: str | None = None
    is_higher_better: bool = True
    unit: str = "tokens"
    lengths: np.ndarray | None = None
    groups: np.ndarray | None = None
    repeated_layers: tuple[type[nn.Module], ...] = ()
    not_for_workers: tuple[str, ...] = ("model",)
    stream: StreamLayout | None = None

    @abstractmethod
    def __len__(self) -> int:
        """Number of training examples."""

    @abstractmethod
    def collate(self, draws: Sequence[Draw]) -> Batch:
        """Make the batch of these draws, on the CPU. A pure function of `draws`: it runs in data workers."""

    @abstractmethod
    def count(self, batch: Batch) -> int:
        """How many tokens of a batch (still on the CPU) are scored; the loss of a step is divided by their sum."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """The loss of a micro-batch that lies on the model's device."""

    @abstractmethod
    def save(self, model: nn.Module, folder: Path) -> None:
        """Write the model into an existing empty folder, in the format that `from_pretrained` opens."""

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Score the model, in evaluation mode and without gradients. Runs on the main process only."""
        return {}

    def draw(self, model: nn.Module) -> Mapping[str, Image]:
        """Pictures to look at, by name, drawn after each evaluation; written to `samples/` and sent to trackers. Runs
        as `evaluate` does."""
        return {}

    def describe(self) -> str:
        """One line for the log: data and model."""
        return f"{type(self).__name__}, {len(self)} examples"

    def __getstate__(self) -> dict[str, Any]:
        """What a data worker that is not forked receives."""
        return {key: value for key, value in self.__dict__.items() if key not in self.not_for_workers}
