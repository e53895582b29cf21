"""Tensors of which each process holds a piece as DeepSpeed's ZeRO-3 cuts them: by elements, the last piece padded.

All that is known here of DeepSpeed's own attributes of parameters and of its optimiser.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmattn.errors import UsageError
from mmattn.training.tensor_rows import TensorFiles


@dataclass(frozen=True)
class Piece:
    """What this process holds of a tensor.

    Attributes:
        local: Its elements in one dimension, padded to as many as any process has; what is written to it is written to
            the tensor.
        first: The number of its first element.
        count: Elements without the padding.
        shape: Of the whole tensor.
    """

    local: Tensor
    first: int
    count: int
    shape: tuple[int, ...]


def own_piece(parameter: nn.Parameter, local: Tensor | None = None) -> Piece:
    """What this process holds of a parameter, or of another tensor (`local`) that is cut alike."""
    held: Any = parameter
    own: Tensor = (held.ds_tensor if local is None else local).detach()
    first = torch.distributed.get_rank() * own.numel()
    return Piece(own, first, max(0, min(own.numel(), held.ds_numel - first)), tuple(held.ds_shape))


def whole_tensor(piece: Piece) -> Tensor:
    """All elements, put together from the pieces of all processes. Every process has to call this."""
    pieces = [torch.empty_like(piece.local) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(pieces, piece.local.contiguous())
    count = torch.Size(piece.shape).numel()
    return torch.cat(pieces)[:count].view(piece.shape)


def read_piece(files: TensorFiles, name: str, piece: Piece) -> None:
    """Fill the piece from a checkpoint's whole tensor."""
    if not piece.count:
        return
    row_size = torch.Size(piece.shape[1:]).numel()
    first_row, end = piece.first // row_size, piece.first + piece.count
    rows = files.read(name, first_row, -(-end // row_size) - first_row)
    start = piece.first - first_row * row_size
    piece.local[: piece.count].copy_(rows.reshape(-1)[start : start + piece.count])


class Moments:
    """The state of the AdamW that steps all parameters of a group together, taken apart by parameter.

    Args:
        optimizer: DeepSpeed's, with torch's AdamW in it.
    """

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer

    def groups(self, parameters: Mapping[str, nn.Parameter]) -> dict[int, list[str]]:
        """Names of the parameters that are stepped together, by the group's number."""
        groups: dict[int, list[str]] = {}
        for name, parameter in parameters.items():
            groups.setdefault(self._place(parameter)[0], []).append(name)
        return groups

    def of(self, parameter: nn.Parameter) -> dict[str, Tensor | Piece]:
        """By kind, a parameter's moments, and the counter of the steps; empty before the first step."""
        group, offset, count = self._place(parameter)
        state: Mapping[str, Tensor] = self._optimizer.optimizer.state.get(self._flat(group), {})
        return {
            kind: own_piece(parameter, value.narrow(0, offset, count)) if value.ndim else value
            for kind, value in state.items()
        }

    def start(self, group: int, step: Tensor) -> None:
        """Give a group moments of 0 and its counter."""
        flat = self._flat(group)
        self._optimizer.optimizer.state[flat] = {
            "step": step.to(flat.device, copy=True),
            "exp_avg": torch.zeros_like(flat),
            "exp_avg_sq": torch.zeros_like(flat),
        }

    def _place(self, parameter: nn.Parameter) -> tuple[int, int, int]:
        return self._optimizer.grad_position[self._optimizer.get_param_id(parameter)]

    def _flat(self, group: int) -> Tensor:
        return self._optimizer.fp32_partitioned_groups_flat[group]


def require_cut(model: nn.Module, num_processes: int) -> None:
    """Check that this process holds its part of every parameter and no more.

    Raises:
        UsageError: when it holds another part of one.
    """
    for name, parameter in model.named_parameters():
        held: Any = parameter
        part = -(-held.ds_numel // num_processes) if hasattr(held, "ds_tensor") else 0
        if not part or held.ds_tensor.numel() != part or parameter.numel() > 0:
            raise UsageError(
                f"sharding zero3 over {num_processes} processes was asked for, but {name} is not cut into as many: "
                "this run would not be what was asked"
            )
