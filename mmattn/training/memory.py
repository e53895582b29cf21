"""How much memory training takes, estimated without the device that will run it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from mmattn.training.batches import make_sampler
from mmattn.training.config import TrainingConfig
from mmattn.training.repeated_layers import repeated_layers
from mmattn.training.task import Task
from mmattn.training.token_sampler import TokenBatches


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one process without sharding.

    Attributes:
        weights: parameters and buffers, as they are stored.
        gradients: of the trained parameters.
        optimizer: AdamW's two moments.
        average: the exponential moving average, when it is on.
        activations: what the backward pass keeps of one micro-batch; where layers are computed anew in it, their
            inputs, and all of the largest of them.
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
    model: nn.Module,
    loss: Callable[[], Tensor],
    *,
    scale: float = 1.0,
    has_average: bool = False,
    recomputed: Iterable[nn.Module] = (),
) -> MemoryEstimate:
    """Count what training would hold, by running the loss once.

    Args:
        model: with `requires_grad` set as in training.
        loss: runs a forward pass of a small batch.
        scale: how many times larger the real micro-batch is.
        has_average: an exponential moving average is kept in float32.
        recomputed: layers that will be computed anew in the backward pass.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    saved = _Saved(own)
    with saved.watching(recomputed), torch.autograd.graph.saved_tensors_hooks(saved.keep, lambda tensor: tensor):
        result = loss()  # alive until counted, so that no address is used twice
    activations = int(saved.total() * scale)
    del result
    weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    count = sum(parameter.numel() for parameter in trained)
    gradients = sum(parameter.nbytes for parameter in trained)
    return MemoryEstimate(weights, gradients, 2 * gradients, 4 * count if has_average else 0, activations)


class _Saved:
    """Bytes that are kept for the backward pass by address: of each recomputed layer, and of all that is outside."""

    def __init__(self, own: set[int]) -> None:
        self._own = own
        self._outside: dict[int, int] = {}
        self._layers: list[dict[int, int]] = []
        self._here = self._outside
        self._inputs: list[Tensor] = []  # alive until counted

    def keep(self, tensor: Tensor) -> Tensor:
        """Count a tensor that is saved now."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._own:
            self._here[storage.data_ptr()] = storage.nbytes()
        return tensor

    @contextmanager
    def watching(self, layers: Iterable[nn.Module]) -> Iterator[None]:
        """Inside, what layers save is told from the rest."""
        handles = []
        for layer in layers:
            handles += [
                layer.register_forward_pre_hook(self._enter, with_kwargs=True),
                layer.register_forward_hook(self._leave),
            ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, layer: nn.Module, args: Any, kwargs: Any) -> None:
        for value in pytree.tree_leaves((args, kwargs)):
            if isinstance(value, Tensor):
                self._inputs.append(self.keep(value))
        self._here = {}
        self._layers.append(self._here)

    def _leave(self, layer: nn.Module, args: Any, output: Any) -> None:
        self._here = self._outside

    def total(self) -> int:
        """With one layer computed anew at a time."""
        layers = [sum(size for address, size in one.items() if address not in self._outside) for one in self._layers]
        return sum(self._outside.values()) + max(layers, default=0)


def estimate_run(task: Task, config: TrainingConfig, *, examples: int = 2) -> MemoryEstimate:
    """What a run of this task would hold in one process, from the loss of a few `examples` of it.

    With `config.batch_tokens` these are the longest ones, and the micro-batch is a full one.

    Raises:
        UsageError: as `make_sampler` does.
    """
    sampler, size = make_sampler(task, config), min(examples, len(task))
    if isinstance(sampler, TokenBatches):
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
        recomputed=repeated_layers(task, task.model).values() if config.activation_checkpointing else (),
    )
