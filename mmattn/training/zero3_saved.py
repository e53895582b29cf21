"""What the backward pass keeps of weights that are gathered for the forward pass only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class _View:
    """A view of a parameter, which is taken anew when the parameter has been gathered for the backward pass."""

    parameter: Any
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


def views_without_weights() -> torch.autograd.graph.saved_tensors_hooks:
    """Inside, products do not keep gathered weights alive: they save `weight.t()`, a view that holds all of its memory
    until the backward pass, whatever DeepSpeed does with the weight."""
    return torch.autograd.graph.saved_tensors_hooks(_pack, _unpack)


def _pack(tensor: Tensor) -> Tensor | _View:
    base: Any = tensor._base
    if base is None or not hasattr(base, "ds_tensor") or base.dtype != tensor.dtype or not base.numel():
        return tensor
    return _View(base, tensor.size(), tensor.stride(), tensor.storage_offset() - base.storage_offset())


def _unpack(kept: Tensor | _View) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    if not kept.parameter.numel():  # its module gave nothing by which DeepSpeed could have seen that this was coming
        kept.parameter.all_gather()
    whole = kept.parameter.data
    return whole.as_strided(kept.size, kept.stride, whole.storage_offset() + kept.offset)
