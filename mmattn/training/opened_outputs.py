"""Modules that give dataclasses, for hooks that see tensors in tuples, lists and dicts only.

A dataclass that is a dict too, as the outputs of transformers and diffusers are, is left to them.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle


class OpenedOutputs:
    """Between hooks that are added before others and hooks that are added after them, the dataclasses that modules give
    are dicts of their fields, whose values the others may replace.

    Args:
        model: All of its modules; the hooks that are to see dicts are added after this.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._handles: list[RemovableHandle] = [module.register_forward_hook(_open) for module in model.modules()]

    def close_again(self, outer: nn.Module) -> None:
        """Add the hooks that make dataclasses again; of the model itself at `outer`, which calls it."""
        inner = [module for module in self._model.modules() if module is not self._model]
        self._handles += [module.register_forward_hook(_close) for module in (*inner, outer)]

    def undo(self) -> None:
        """Take all hooks off."""
        for handle in self._handles:
            handle.remove()


class _Fields(dict):
    source: Any


def _open(module: nn.Module, args: Any, output: Any) -> Any:
    if not dataclasses.is_dataclass(output) or isinstance(output, type | dict):
        return None
    fields = _Fields({field.name: getattr(output, field.name) for field in dataclasses.fields(output)})
    fields.source = output
    return fields


def _close(module: nn.Module, args: Any, output: Any) -> Any:
    if not isinstance(output, _Fields):
        return None
    result = copy.copy(output.source)
    for name, value in output.items():
        object.__setattr__(result, name, value)  # it may be frozen
    return result
