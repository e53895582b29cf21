"""Tensors of which a process holds some rows, in memory and in the files of a checkpoint.

FSDP2 cuts each parameter along its first dimension, one run of rows a process. Which rows a file has stands in its
header, so that a checkpoint may be read by any number of processes: each reads the rows that it holds itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from mmattn.errors import CheckpointError

_HEADER = "mmattn_rows"
_PART_NAME = re.compile(r"(?P<kind>.+)-(?P<part>\d{5})-of-(?P<parts>\d{5})\.safetensors")


@dataclass(frozen=True)
class Rows:
    """What this process holds of a tensor.

    Attributes:
        local: The rows, a view: what is written to it is written to the tensor. A whole tensor is one run of rows.
        first: The number of its first row.
        shape: Of the whole tensor.
    """

    local: Tensor
    first: int
    shape: tuple[int, ...]


def own_rows(tensor: Tensor) -> Rows:
    """The rows of a tensor that this process holds: all but where it is a `DTensor`."""
    value = tensor.detach()
    if not isinstance(value, DTensor):
        return Rows(value, 0, tuple(value.shape))
    if value.placements != (Shard(0),):
        raise NotImplementedError(f"a tensor is spread as {value.placements}, expected rows over one mesh dimension")
    mesh = value.device_mesh
    per_process = -(-value.shape[0] // mesh.size())  # as torch.chunk cuts
    return Rows(value.to_local(), min(mesh.get_local_rank() * per_process, value.shape[0]), tuple(value.shape))


def whole(tensor: Tensor, like: Tensor) -> Tensor:
    """All rows of a tensor, put together from those that each process holds. Every process has to call this.

    Args:
        tensor: A `DTensor`, or the own rows of one that is spread as `like` is. Others are returned as they are.
        like: The parameter, or the tensor itself.
    """
    value = tensor.detach()
    if not isinstance(value, DTensor) and isinstance(like, DTensor):
        placed: dict[str, Any] = {"shape": like.shape, "stride": like.stride()}
        value = DTensor.from_local(value, like.device_mesh, like.placements, run_check=False, **placed)
    return value.full_tensor() if isinstance(value, DTensor) else value


def write_rows(tensors: Mapping[str, Rows], folder: Path, kind: str, part: int, parts: int) -> Path:
    """Write the rows of process `part` of `parts`; the file."""
    path = folder / f"{kind}-{part:05d}-of-{parts:05d}.safetensors"
    facts = {name: {"first": rows.first, "shape": list(rows.shape)} for name, rows in tensors.items()}
    values = {name: rows.local.to("cpu", copy=True).contiguous() for name, rows in tensors.items()}
    save_file(values, path, metadata={_HEADER: json.dumps(facts)})
    return path


class TensorFiles:
    """The tensors of one kind in a checkpoint, `KIND.safetensors` or `KIND-00000-of-00002.safetensors` and so on.

    A context manager: the files are open inside.

    Args:
        folder: The checkpoint.
        kind: Such as "trained".

    Raises:
        CheckpointError: a file that is missing or damaged, or files that do not belong together.
    """

    def __init__(self, folder: Path, kind: str) -> None:
        self.folder, self.kind = folder, kind
        self._stack = ExitStack()
        self._places: dict[str, list[tuple[int, int, Any]]] = {}  # (first row, beyond the last, file) by name
        self.shapes: dict[str, tuple[int, ...]] = {}

    @staticmethod
    def exist(folder: Path, kind: str) -> bool:
        """Whether the checkpoint has tensors of this kind."""
        return (folder / f"{kind}.safetensors").exists() or bool(_parts(folder, kind))

    def __enter__(self) -> Self:
        try:
            for path in self._paths():
                self._add(self._stack.enter_context(safe_open(path, framework="pt")))
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            raise CheckpointError(f"{self.folder}: its {self.kind} tensors cannot be read: {error}") from error
        for name, shape in self.shapes.items():
            self._require_complete(name, shape)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self._stack.close()

    def _paths(self) -> list[Path]:
        single = self.folder / f"{self.kind}.safetensors"
        if single.exists():
            return [single]
        found = _parts(self.folder, self.kind)
        if not found:
            raise CheckpointError(f"{self.folder} holds no {self.kind} tensors: neither {single.name} nor pieces of it")
        number = max(found.values())
        missing = sorted(set(range(number)) - found.keys())
        if missing:
            raise CheckpointError(
                f"{self.folder}: of the {number} pieces of its {self.kind} tensors, that of process "
                f"{', '.join(map(str, missing))} is missing"
            )
        return [self.folder / f"{self.kind}-{part:05d}-of-{number:05d}.safetensors" for part in sorted(found)]

    def _add(self, file: Any) -> None:
        facts = json.loads((file.metadata() or {}).get(_HEADER, "{}"))
        for name in file.keys():  # noqa: SIM118 (a safetensors file is no mapping)
            own = tuple(file.get_slice(name).get_shape())
            shape = tuple(facts[name]["shape"]) if facts else own
            first = int(facts[name]["first"]) if facts else 0
            if self.shapes.setdefault(name, shape) != shape:
                raise ValueError(f"{name} has the shapes {self.shapes[name]} and {shape} in two of them")
            self._places.setdefault(name, []).append((first, first + own[0] if own else 1, file))

    def _require_complete(self, name: str, shape: tuple[int, ...]) -> None:
        row = 0
        for first, end, _ in sorted(self._places[name], key=lambda place: place[:2]):
            if first > row:
                break
            row = max(row, end)
        if row < (shape[0] if shape else 1):
            raise CheckpointError(f"{self.folder}: rows from {row} on of {name} are in none of its pieces")

    def read(self, name: str, first: int = 0, count: int | None = None) -> Tensor:
        """Rows `first` to `first + count` of a tensor; all of it without `count`."""
        shape, places = self.shapes[name], self._places[name]
        if not shape:
            return places[0][2].get_tensor(name)
        end = shape[0] if count is None else first + count
        pieces, row = [], first
        for place_first, place_end, file in sorted(places, key=lambda place: place[:2]):
            stop = min(end, place_end)
            if place_first <= row < stop:
                pieces.append(file.get_slice(name)[row - place_first : stop - place_first])
                row = stop
        if not pieces:
            return places[0][2].get_slice(name)[0:0]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def read_into(self, target: Tensor, name: str) -> None:
        """Fill the rows of a tensor that this process holds."""
        rows = own_rows(target)
        rows.local.copy_(self.read(name, rows.first, rows.local.shape[0] if rows.shape else None))


def _parts(folder: Path, kind: str) -> dict[int, int]:
    names = [match for path in folder.glob(f"{kind}-*.safetensors") if (match := _PART_NAME.fullmatch(path.name))]
    return {int(match["part"]): int(match["parts"]) for match in names if match["kind"] == kind}
