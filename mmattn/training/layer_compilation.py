"""Repeated layers that run as torch.compile makes them, in training steps."""

from __future__ import annotations

import traceback
import types
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import torch
import torch._dynamo.config as compiler_config
from torch import nn
from torch._dynamo.exc import TorchDynamoException

from mmattn.errors import RunError
from mmattn.ops.observe import OBSERVERS, STEER
from mmattn.ops.own_code import with_own_code
from mmattn.ops.registry import selected
from mmattn.training.repeated_layers import OwnForwards, required_layers
from mmattn.training.task import Task

BACKEND = "inductor"
# One code, of ResNet blocks for instance, serves layers of more widths and resolutions than torch would compile it for.
_MOST_KINDS = 64
_INNERMOST = 5


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
        self._own = OwnForwards(layers.values())
        compiled: dict[Hashable, Callable[..., Any]] = {}
        for name, layer in layers.items():
            layer.forward = _Compiled(layer.forward, name, compiled, getattr(layer, "runs_own_kernels", None))

    def undo(self) -> None:
        """Give the layers their own `forward` back."""
        self._own.give_back()


class _Compiled:
    """A layer's `forward`; `compiled` is shared by the layers of one run. A layer for which `runs_own_kernels` says so
    of a call's arguments runs as it is."""

    def __init__(
        self,
        forward: Callable[..., Any],
        name: str,
        compiled: dict[Hashable, Callable[..., Any]],
        runs_own_kernels: Callable[..., bool] | None = None,
    ) -> None:
        self.forward, self.name, self._compiled = forward, name, compiled
        self._runs_own_kernels = runs_own_kernels

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Recording and steering look into calls, which a compiled layer does not show.
        if not torch.is_grad_enabled() or OBSERVERS.get() or STEER.get() is not None:
            return self.forward(*args, **kwargs)
        if self._runs_own_kernels is not None and self._runs_own_kernels(*args, **kwargs):
            return self.forward(*args, **kwargs)
        try:
            with compiler_config.patch(recompile_limit=_MOST_KINDS):
                return self._run(args, kwargs)
        except TorchDynamoException as error:
            reason = " ".join(str(error).split("\n\n")[0].split())
            raise RunError(
                f"training.torch_compile: layer {self.name} cannot be compiled: {reason} (from {_places(error)}; "
                "--debug shows the traceback)"
            ) from error

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # What `use_backend` says is compiled in without a guard.
        choice = (selected("self"), selected("cross"), selected(None))
        if isinstance(self.forward, types.MethodType) and isinstance(self.forward.__func__, types.FunctionType):
            function, layer = self.forward.__func__, self.forward.__self__
            return self._of((function, choice), lambda: with_own_code(function))(layer, *args, **kwargs)
        return self._of((self.forward, choice), lambda: self.forward)(*args, **kwargs)

    def _of(self, key: Hashable, function: Callable[[], Callable[..., Any]]) -> Callable[..., Any]:
        if key not in self._compiled:
            self._compiled[key] = torch.compile(function(), backend=BACKEND)
        return self._compiled[key]


def _places(error: BaseException) -> str:
    """The innermost lines that an error came from: compiling again for a traceback may take long."""
    while error.__cause__ is not None:
        error = error.__cause__
    frames = traceback.extract_tb(error.__traceback__)[: -_INNERMOST - 1 : -1]
    return ", ".join(f"{'/'.join(Path(frame.filename).parts[-3:])}:{frame.lineno}" for frame in frames)
