"""The layers that a model repeats: what is sharded, and computed anew in the backward pass, one after the other."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from mmattn.training.task import Task


def repeated_layers(task: Task, model: nn.Module) -> dict[str, nn.Module]:
    """The modules of `model` that are of `task.repeated_layers`, by name; of nested ones the outermost.

    Args:
        task: Says the classes.
        model: The task's model, or a copy of it.
    """
    return dict(_outermost(model, "", task.repeated_layers))


def _outermost(module: nn.Module, name: str, kinds: tuple[type[nn.Module], ...]) -> Iterator[tuple[str, nn.Module]]:
    if name and isinstance(module, kinds):
        yield name, module
        return
    for child_name, child in module.named_children():
        yield from _outermost(child, f"{name}.{child_name}" if name else child_name, kinds)
