"""Repeated layers that run as torch.compile makes them, in training steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo.config as compiler_config
from torch import nn
from torch._dynamo.exc import TorchDynamoException

from mmattn.errors import RunError
from mmattn.training.repeated_layers import required_layers
from mmattn.training.task import Task

BACKEND = "inductor"
# One code, of ResNet blocks for instance, serves layers of more widths and resolutions than torch would compile it for.
_MOST_KINDS = 64


class LayerCompilation:
    """Makes the repeated layers of a model run compiled wherever gradients are wanted, until `undo`.

    What lies between their matrix products becomes a few kernels: norms, activations, dropout, casts. Equal layers
    share one compilation. Evaluations, and what looks into a model, run the layers as they are. Names of modules and
    parameters stay. Losses differ from those without by rounding, and dropout draws other numbers.

    Args:
        task: Says which layers.
        model: The task's model, or a copy of it.

    Raises:
        UsageError: when the task names no layers, or the model has none of them.
    """

    def __init__(self, task: Task, model: nn.Module) -> None:
        layers = required_layers(task, model, "torch_compile")
        self._layers = list(layers.values())
        self._own_forwards = [vars(layer).get("forward") for layer in self._layers]
        for name, layer in layers.items():
            layer.forward = _Compiled(layer.forward, name)

    def undo(self) -> None:
        """Give the layers their own `forward` back."""
        for layer, own in zip(self._layers, self._own_forwards, strict=True):
            if own is None:
                del vars(layer)["forward"]
            else:
                layer.forward = own


class _Compiled:
    def __init__(self, forward: Callable[..., Any], name: str) -> None:
        self.forward, self.name = forward, name
        self.compiled = torch.compile(forward, backend=BACKEND)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.forward(*args, **kwargs)
        try:
            with compiler_config.patch(recompile_limit=_MOST_KINDS):
                return self.compiled(*args, **kwargs)
        except TorchDynamoException as error:
            reason = " ".join(str(error).split("\n\n")[0].split())
            raise RunError(f"training.torch_compile: layer {self.name} cannot be compiled: {reason}") from error
