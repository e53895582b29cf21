"""Which modules of a model attend, in what role, and which of them are wanted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from mmattn.errors import RunError, UsageError
from mmattn.nn.projected_attention import ProjectedAttention
from mmattn.swap.layers import JOINT
from mmattn.swap.parts import is_diffusers, is_transformers, uncompiled

Role = Literal["self", "cross"]
Numbers = int | Sequence[int] | None
Layers = int | str | Sequence[int | str] | None
_SHOWN = 12  # layers that an error lists


class AttendingLayer(NamedTuple):
    """An attention module of one role.

    Attributes:
        number: counted from 0 in the order in which the layers run.
        name: its path in the model.
        module: the module.
        is_joint: text and picture share its softmax.
    """

    number: int
    name: str
    module: nn.Module
    is_joint: bool = False


def attending_layers(model: nn.Module, role: Role) -> list[AttendingLayer]:
    """The attention modules of a role, numbered in the order in which they run. Joint attention of a text and a picture
    counts as cross-attention.

    Raises:
        UsageError: there are none.
    """
    roles = ("cross", JOINT) if role == "cross" and is_diffusers(model) else (role,)
    modules = list(model.named_modules())
    # What an IP-Adapter makes of its picture is no part of the picture that is drawn.
    aside = tuple(f"{name}." for name, module in modules if "IPAdapter" in type(module).__name__)
    named = [(name, module) for name, module in modules if not name.startswith(aside)]
    found = [(name, module) for name, module in named if _role(module, name, model) in roles]
    if not found:
        raise UsageError(f"record_attention: {type(model).__name__} has no {role}-attention that can be read")
    # A U-Net's middle is made last and runs between the two halves.
    found.sort(key=lambda pair: _stage(pair[0]))
    return [
        AttendingLayer(number, name, module, _role(module, name, model) == JOINT)
        for number, (name, module) in enumerate(found)
    ]


def _stage(name: str) -> int:
    order = ("down_blocks", "mid_block", "up_blocks")
    return next((place for place, part in enumerate(order) if name.startswith(part)), 0)


def _role(module: nn.Module, name: str, model: nn.Module) -> str | None:
    if isinstance(module, ProjectedAttention):
        return module.role
    layer = None
    if is_diffusers(model):
        from mmattn.swap.diffusers.install import layer_of

        layer = layer_of(module, name, "model")
    elif is_transformers(model):
        from mmattn.swap.transformers.install import layer_of as stock_layer_of

        layer = stock_layer_of(module, name, "model")
    return None if layer is None else layer.role


def chosen_layers(layers: Sequence[AttendingLayer], chosen: Layers) -> list[AttendingLayer]:
    """Those that are asked for, by number or by a part of their name.

    Raises:
        UsageError: one that is not there; the message says which are.
    """
    if chosen is None:
        return list(layers)
    wanted = as_layers(chosen)
    for each in wanted:
        if not any(_is_meant(layer, each) for layer in layers):
            shown = ", ".join(f"{layer.number} ({layer.name})" for layer in layers[:_SHOWN])
            more = f" and {len(layers) - _SHOWN} more" if len(layers) > _SHOWN else ""
            raise UsageError(f"record_attention: layers has {each!r}, which is not there: there are {shown}{more}")
    return [layer for layer in layers if any(_is_meant(layer, each) for each in wanted)]


def _is_meant(layer: AttendingLayer, wanted: int | str) -> bool:
    return layer.number == wanted if isinstance(wanted, int) else wanted in layer.name


def as_layers(chosen: int | str | Sequence[int | str]) -> list[int | str]:
    """One layer or several as a list."""
    return [chosen] if isinstance(chosen, int | str) else list(chosen)


def as_numbers(chosen: Numbers) -> list[int] | None:
    """One number or several as a list; None stays None."""
    if chosen is None:
        return None
    return [chosen] if isinstance(chosen, int) else list(chosen)


def grid_of(size: tuple[int, int], num_places: int, *, where: str) -> tuple[int, int]:
    """Rows and columns of a layer's places, for latents of a size; levels of a model halve it, rounding up.

    Args:
        size: rows and columns of the latents.
        num_places: of the layer.
        where: the layer, as a message begins.

    Raises:
        RunError: no level has so many places.
    """
    rows, columns = size
    while rows * columns > num_places:
        rows, columns = -(-rows // 2), -(-columns // 2)
    if rows * columns != num_places:
        raise RunError(
            f"{where} has {num_places} places, which is no level of {size[0]} x {size[1]}: they are not the picture's, "
            "or not its alone (text and picture together, as in single-stream layers)"
        )
    return rows, columns


def check_heads(heads: Sequence[int] | None, count: int, where: str) -> None:
    """Raise `UsageError` for a head that a layer does not have."""
    wrong = [head for head in heads or () if not 0 <= head < count]
    if wrong:
        raise UsageError(f"record_attention: heads={list(heads or ())}, but there are {count} heads ({where})")


def is_compiled(model: Any) -> bool:
    """Whether `torch.compile` runs a model, wholly or in parts."""
    parts = model.modules() if isinstance(model, nn.Module) else ()
    is_wrapped = uncompiled(model) is not model and hasattr(model, "_orig_mod")
    return is_wrapped or any(getattr(part, "_compiled_call_impl", None) is not None for part in parts)


def check_not_compiled(name: str, model: Any) -> None:
    """Raise `UsageError` for a model that `torch.compile` runs, wholly or in parts."""
    if is_compiled(model):
        raise UsageError(
            f"record_attention: {name} is compiled, and inside torch.compile nothing can be seen: record with the model"
            " that was not compiled (of torch.compile(model), that is model._orig_mod)"
        )


def check_not_compiling() -> None:
    """Raise `UsageError` where torch.compile traces what is to be seen."""
    if torch.compiler.is_compiling():
        raise UsageError(
            "record_attention: the model runs inside torch.compile, where nothing can be seen: run it uncompiled"
        )
