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
from mmattn.training.deepspeed_package import told_local_size
from mmattn.training.devices import sum_over_processes
from mmattn.training.gradients import Gradients
from mmattn.training.zero3_leftovers import Leftovers
from mmattn.training.zero3_saved import views_without_weights


class PartitionedGradients(Gradients):
    """Gradients of which each process keeps a piece, summed over processes after each micro-batch.

    Args:
        engine: DeepSpeed's.
        parameters: The trained ones, by name.
        accelerator: Of the run.
        leftovers: Of the engine.
    """

    def __init__(
        self, engine: Any, parameters: Mapping[str, nn.Parameter], accelerator: Accelerator, leftovers: Leftovers
    ) -> None:
        self._engine, self._accelerator, self._parameters = engine, accelerator, parameters
        self._leftovers = leftovers
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
        self._leftovers.trim()
        return views_without_weights(self._engine.module.ds_inflight_param_registry)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a loss, which is averaged over processes.

        Raises:
            UsageError: a parameter has a gradient in some processes only.
        """
        loss.register_hook(self._require_same)  # called first of all in the backward pass
        with told_local_size():
            self._engine.backward(loss, scale_wrt_gas=False)

    def _require_same(self, gradient: Tensor) -> None:
        """DeepSpeed sums what comes, bucket by bucket: of other parameters elsewhere, or waiting for ever."""
        takes_part = [float(_is_in_pass(parameter)) for parameter in self._parameters.values()]
        counts = sum_over_processes(self._accelerator, takes_part)
        number = self._accelerator.num_processes
        some = {name: count for name, count in zip(self._parameters, counts, strict=True) if 0 < count < number}
        if some:
            names = ", ".join(f"{name} ({int(count)} of {number})" for name, count in list(some.items())[:5])
            raise _said_by_all(
                f"parameters took part in a micro-batch on some processes only: {names}; DeepSpeed would mix up their "
                "gradients: let every process use the same ones, times 0 where they do not matter"
            )

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
            raise _said_by_all(
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


def _is_in_pass(parameter: nn.Parameter) -> bool:
    """Whether the backward pass that runs now gets to a parameter, but for what is computed anew in a pass of its own.

    Of what it does not get to nothing may be kept here: it would be of the shape that the parameter has now.
    """
    with torch.enable_grad():
        function = parameter.view_as(parameter).grad_fn
    assert function is not None
    accumulating = function.next_functions[0][0]
    assert accumulating is not None
    return torch._C._will_engine_execute_node(accumulating)


def _said_by_all(message: str) -> UsageError:
    error = UsageError(message)
    error.is_everywhere = True
    return error


def held_gradients(engine: Any) -> Tensor:
    """This process's piece of all gradients, one after the other, with zeros between them."""
    return engine.optimizer.grad_partitions_flat_buffer
