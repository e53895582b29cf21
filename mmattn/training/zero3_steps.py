"""Steps of DeepSpeed's ZeRO-3 as the loop takes them: the norm, clipping and whether a step is taken are the loop's."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from mmattn.errors import RunError, UsageError
from mmattn.training.devices import sum_over_processes
from mmattn.training.gradients import Gradients
from mmattn.training.zero3_saved import views_without_weights


class PartitionedGradients(Gradients):
    """Gradients of which each process keeps a piece, summed over processes after each micro-batch.

    Args:
        engine: DeepSpeed's.
        parameters: The trained ones, by name.
        accelerator: Of the run.
    """

    def __init__(self, engine: Any, parameters: Mapping[str, nn.Parameter], accelerator: Accelerator) -> None:
        self._engine, self._accelerator, self._parameters = engine, accelerator, parameters
        self._reached: set[str] = set()
        self._handles = [
            parameter.register_post_accumulate_grad_hook(functools.partial(self._reach, name))
            for name, parameter in parameters.items()
        ]

    def _reach(self, name: str, parameter: Tensor) -> None:
        self._reached.add(name)

    def micro_batch(self, *, is_last: bool) -> AbstractContextManager[None]:
        """Nothing waits, and no weights are kept for the backward pass."""
        self._engine.set_gradient_accumulation_boundary(is_last)
        return views_without_weights()

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a loss, which is averaged over processes."""
        self._engine.backward(loss, scale_wrt_gas=False)

    def clip(self, max_norm: float) -> Tensor:
        """Scale gradients of a larger norm down to `max_norm`; the norm before that, a scalar.

        Raises:
            UsageError: a trained parameter has no gradient.
        """
        self._require_all()
        own = held_gradients(self._engine)
        (squares,) = sum_over_processes(self._accelerator, [torch.linalg.vector_norm(own).item() ** 2])
        norm = math.sqrt(squares)
        if math.isfinite(norm) and norm + 1e-6 > max_norm:
            own.mul_(max_norm / (norm + 1e-6))
        return torch.tensor(norm, dtype=torch.float64)

    def _require_all(self) -> None:
        missing = sorted(self._parameters.keys() - self._reached)
        self._reached.clear()
        if missing:
            raise UsageError(
                f"{', '.join(missing[:5])} took no part in a step, and DeepSpeed would decay its weights all the same: "
                "freeze what is not used, or use training.sharding=fsdp2"
            )

    def discard(self) -> None:
        """Let DeepSpeed leave the step out, which it does by itself for what is not finite."""
        held_gradients(self._engine).fill_(math.nan)
        self._engine.step()
        if self._engine.was_step_applied():
            raise RunError("DeepSpeed took a step that was to be left out: this run is not to be trusted")

    def close(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()


class PartitionedOptimizer:
    """DeepSpeed's optimiser, whose steps go through its engine.

    Args:
        engine: DeepSpeed's.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Those of torch's AdamW in it."""
        return self._engine.optimizer.optimizer.param_groups

    def zero_grad(self) -> None:
        """Forget the gradients."""
        self._engine.optimizer.zero_grad()
        # DeepSpeed only writes over what it has, and not where a parameter takes no part.
        held_gradients(self._engine).zero_()

    def step(self) -> None:
        """Change the parameters by their gradients.

        Raises:
            RunError: when DeepSpeed found them not to be finite.
        """
        self._engine.step()
        if not self._engine.was_step_applied():
            raise RunError("DeepSpeed left out a step whose loss and gradient are finite: use training.sharding=fsdp2")


def held_gradients(engine: Any) -> Tensor:
    """This process's piece of all gradients, one after the other, with zeros between them."""
    return engine.optimizer.grad_partitions_flat_buffer
