"""How much memory training takes, estimated without the device that will run it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmattn.training.batches import make_sampler
from mmattn.training.config import TrainingConfig
from mmattn.training.task import Task
from mmattn.training.token_sampler import TokenSampler


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one process without sharding.

    Attributes:
        weights: parameters and buffers, as they are stored.
        gradients: of the trained parameters.
        optimizer: AdamW's two moments.
        average: the exponential moving average, when it is on.
        activations: what the backward pass keeps of one micro-batch.
    """

    weights: int
    gradients: int
    optimizer: int
    average: int
    activations: int

    @property
    def total(self) -> int:
        """All parts together; the allocator and temporary buffers come on top."""
        return self.weights + self.gradients + self.optimizer + self.average + self.activations

    def __str__(self) -> str:
        parts = ("weights", "gradients", "optimizer", "average", "activations")
        details = ", ".join(f"{part} {getattr(self, part) / 2**20:.1f}" for part in parts if getattr(self, part))
        return f"about {self.total / 2**20:.1f} MiB ({details})"


def estimate_memory(
    model: nn.Module, loss: Callable[[], Tensor], *, scale: float = 1.0, has_average: bool = False
) -> MemoryEstimate:
    """Count what training would hold, by running the loss once.

    Args:
        model: with `requires_grad` set as in training.
        loss: runs a forward pass of a small batch.
        scale: how many times larger the real micro-batch is.
        has_average: an exponential moving average is kept in float32.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = loss()  # alive until counted, so that no address is used twice
    activations = int(sum(saved.values()) * scale)
    del result
    weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    count = sum(parameter.numel() for parameter in trained)
    gradients = sum(parameter.nbytes for parameter in trained)
    return MemoryEstimate(weights, gradients, 2 * gradients, 4 * count if has_average else 0, activations)


def estimate_run(task: Task, config: TrainingConfig, *, examples: int = 2) -> MemoryEstimate:
    """What a run of this task would hold in one process, from the loss of a few `examples` of it.

    With `config.batch_tokens` these are the longest ones, and the micro-batch is a full one.

    Raises:
        UsageError: as `make_sampler` does.
    """
    sampler, size = make_sampler(task, config), min(examples, len(task))
    if isinstance(sampler, TokenSampler):
        chosen = sampler.longest(size)
        scale = sampler.micro_limit / sampler.padded_tokens(chosen)
    else:
        # Examples of different groups cannot share a batch, those of a step can.
        chosen = list(range(size)) if task.groups is None else [number for _, number in sampler.draws(0)[:size]]
        scale = (config.micro_batch_size or config.batch_size) / len(chosen)
    batch = task.collate([(0, index) for index in chosen])
    task.model.train()
    return estimate_memory(
        task.model,
        lambda: task.loss(task.model, batch).total,
        scale=scale,
        has_average=config.ema_decay is not None,
    )
