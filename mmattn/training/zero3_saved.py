"""What the backward pass keeps of weights that are gathered for the forward pass only."""

from __future__ import annotations

import functools
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmattn.errors import RunError


@dataclass(frozen=True)
class _View:
    """A view of a parameter, which is taken anew when the parameter has been gathered for the backward pass."""

    parameter: Any
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


def views_without_weights(in_flight: MutableMapping[Any, Any]) -> torch.autograd.graph.saved_tensors_hooks:
    """Inside, products do not keep gathered weights alive: they save `weight.t()`, a view that holds all of its memory
    until the backward pass, whatever DeepSpeed does with the weight.

    Args:
        in_flight: DeepSpeed's handles of the parameters that are being gathered.
    """
    return torch.autograd.graph.saved_tensors_hooks(_pack, functools.partial(_unpack, in_flight))


def _pack(tensor: Tensor) -> Tensor | _View:
    base: Any = tensor._base
    if base is None or not hasattr(base, "ds_tensor") or base.dtype != tensor.dtype or not base.numel():
        return tensor
    return _View(base, tensor.size(), tensor.stride(), tensor.storage_offset() - base.storage_offset())


def _unpack(in_flight: MutableMapping[Any, Any], kept: Tensor | _View) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    _gather(kept.parameter, in_flight)
    whole = kept.parameter.data
    return whole.as_strided(kept.size, kept.stride, whole.storage_offset() + kept.offset)


def _gather(parameter: Any, in_flight: MutableMapping[Any, Any]) -> None:
    # Only where its module gave nothing by which DeepSpeed could have seen that this was coming.
    if parameter.ds_status.name == "NOT_AVAILABLE":
        parameter.all_gather()
    elif parameter.ds_status.name == "INFLIGHT" and parameter in in_flight:
        # On its way for a later use: it may have its memory already, and not yet its values.
        in_flight.pop(parameter).wait()
    if parameter.ds_status.name != "AVAILABLE":
        raise RunError(
            f"DeepSpeed has not gathered a parameter of shape {list(parameter.ds_shape)} for the backward pass: use "
            "training.sharding=fsdp2"
        )
