"""The layers that a model repeats: what is sharded, and computed anew in the backward pass, one after the other."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from mmattn.errors import UsageError
from mmattn.training.task import Task


def repeated_layers(task: Task, model: nn.Module) -> dict[str, nn.Module]:
    """The modules of `model` that are of `task.repeated_layers`, by name; of nested ones the outermost.

    Args:
        task: Says the classes.
        model: The task's model, or a copy of it.
    """
    return dict(_outermost(model, "", task.repeated_layers))


def required_layers(task: Task, model: nn.Module, setting: str) -> dict[str, nn.Module]:
    """As `repeated_layers`, for a setting of a run that is nothing without them.

    Raises:
        UsageError: when the task names no layers, or the model has none of them.
    """
    layers = repeated_layers(task, model)
    if not layers:
        named = ", ".join(kind.__name__ for kind in task.repeated_layers) or "none"
        raise UsageError(
            f"training.{setting} works layer by layer, and {type(model).__name__} has no layers of the classes in "
            f"{type(task).__name__}.repeated_layers ({named}): name them there, or leave it out"
        )
    return layers


def _outermost(module: nn.Module, name: str, kinds: tuple[type[nn.Module], ...]) -> Iterator[tuple[str, nn.Module]]:
    if name and isinstance(module, kinds):
        yield name, module
        return
    for child_name, child in module.named_children():
        yield from _outermost(child, f"{name}.{child_name}" if name else child_name, kinds)
