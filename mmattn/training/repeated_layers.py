"""The layers that a model repeats: what is sharded, and computed anew in the backward pass, one after the other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

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


class OwnForwards:
    """What modules have as their `forward` now, to be given back when a run that puts others over it ends.

    Args:
        modules: Whose.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._own = [(module, vars(module).get("forward")) for module in modules]

    def give_back(self) -> None:
        """The class's, where a module had none of its own."""
        for module, own in self._own:
            if own is None:
                vars(module).pop("forward", None)
            else:
                module.forward = own


def _outermost(module: nn.Module, name: str, kinds: tuple[type[nn.Module], ...]) -> Iterator[tuple[str, nn.Module]]:
    if name and isinstance(module, kinds):
        yield name, module
        return
    for child_name, child in module.named_children():
        yield from _outermost(child, f"{name}.{child_name}" if name else child_name, kinds)
