"""Layers that keep their inputs only, and are computed a second time in the backward pass (arXiv 1604.06174)."""

from __future__ import annotations

import contextvars
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from mmattn.errors import UsageError
from mmattn.training.repeated_layers import OwnForwards, required_layers
from mmattn.training.task import Task


class ActivationCheckpointing:
    """Makes the repeated layers of a model compute their activations anew in the backward pass, until `undo`.

    Losses and gradients stay the same bit for bit, dropout included. Names of modules and parameters stay as they are.

    Args:
        task: Says which layers.
        model: The task's model, or a copy of it.

    Raises:
        UsageError: when the task names no layers, the model has none of them, or one holds a batch norm.
    """

    def __init__(self, task: Task, model: nn.Module) -> None:
        layers = required_layers(task, model, "activation_checkpointing")
        for name, layer in layers.items():
            if any(isinstance(part, _BatchNorm) for part in layer.modules()):
                raise UsageError(
                    f"training.activation_checkpointing runs layers twice, and {name} has a batch norm, which would "
                    "count its batch twice: leave it out, or name layers without one in repeated_layers"
                )
        self._own = OwnForwards(layers.values())
        for layer in layers.values():
            layer.forward = _Recomputed(layer.forward)

    def undo(self) -> None:
        """Give the layers their own `forward` back."""
        self._own.give_back()


class _Recomputed:
    def __init__(self, forward: Callable[..., Any]) -> None:
        self.forward = forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.forward(*args, **kwargs)
        # The second time may be in another thread, where neither the chosen backends nor observers are in force.
        context = contextvars.copy_context()
        return checkpoint(functools.partial(context.run, self.forward), *args, use_reentrant=False, **kwargs)
