"""Weights of foreign checkpoints to ours and back: one table form for every family, and strict loading.

A family's table is a list of `Weight`s. Each says which tensors of ours make which tensors of the stock file, and how.
Reading and writing use the same table, so what is saved is what was opened.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from mmattn.errors import CheckpointError
from mmattn.models.sources import TensorFiles

_LISTED = 6  # names listed per kind of fault in an error


@dataclass(frozen=True)
class Weight:
    """One row of a table: `ours` and `stock` tensor names.

    One name each: the same values, with `stock_lead` axes of size 1 before ours in the stock file. Several of ours to
    one of stock: stock holds them joined along the first axis, in equal parts (a fused QKV).
    """

    ours: tuple[str, ...]
    stock: str
    stock_lead: int = 0

    def to_stock(self, parts: Sequence[Tensor]) -> Tensor:
        """Our tensors to the stock tensor."""
        joined = parts[0] if len(parts) == 1 else torch.cat(list(parts))
        return joined.reshape((1,) * self.stock_lead + tuple(joined.shape))

    def to_ours(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """The stock tensor to ours."""
        tensor = tensor.reshape(tensor.shape[self.stock_lead :])
        return (tensor,) if len(self.ours) == 1 else tensor.chunk(len(self.ours))


@dataclass(frozen=True)
class WeightTable:
    """A family's weights.

    Args:
        weights: every tensor of the network, once.
        copies: stock name to the stock name whose values it repeats (tied weights): such a tensor may be absent or
            present, and it is not written. Present with other values, it is an error.
        also_written: stock name to the stock name whose values are written there too: stock keeps a tensor of its own
            in that place, though nothing reads it, or it is among `copies`.
        ignored: patterns (regular expressions, whole name) of stock tensors that follow from the config.
    """

    weights: tuple[Weight, ...]
    copies: Mapping[str, str] = field(default_factory=dict)
    also_written: Mapping[str, str] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()


def identity_table(network: nn.Module) -> WeightTable:
    """The table of a network that is saved under its own names."""
    return WeightTable(tuple(Weight((name,), name) for name in network.state_dict()))


def load_weights(network: nn.Module, table: WeightTable, files: TensorFiles, *, dtype: torch.dtype | None) -> None:
    """Put a checkpoint's tensors into a network, strictly. The network may be on the meta device.

    Args:
        network: takes the tensors as its parameters and buffers.
        table: the family's table.
        files: the checkpoint.
        dtype: of floating-point tensors; None: as in the file.

    Raises:
        CheckpointError: tensors missing, not known, or of another shape (all listed).
    """
    expected = network.state_dict()
    shapes = files.shapes()
    sources = _check(table, expected, shapes, files.folder)
    state: dict[str, Tensor] = {}
    for weight in table.weights:
        tensor = files.read(sources[weight.stock])
        if tensor.is_floating_point():
            tensor = tensor.to(dtype or tensor.dtype)
        for name, part in zip(weight.ours, weight.to_ours(tensor), strict=True):
            state[name] = part.contiguous() if len(weight.ours) == 1 else part.clone()
    _check_copies(table, files, shapes)
    network.load_state_dict(state, strict=True, assign=True)


def _check(
    table: WeightTable, expected: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], folder: Path
) -> dict[str, str]:
    """Where in the file each stock tensor is found; raises when the file is not exactly what the table says."""
    sources: dict[str, str] = {}
    missing: list[str] = []
    mis_shaped: list[str] = []
    for weight in table.weights:
        holders = [weight.stock, *(copy for copy, source in table.copies.items() if source == weight.stock)]
        held = next((name for name in holders if name in shapes), None)
        wanted = tuple(weight.to_stock([expected[name].to("meta") for name in weight.ours]).shape)
        if held is None:
            missing.append(weight.stock)
        elif shapes[held] != wanted:
            mis_shaped.append(f"{held} is {list(shapes[held])}, not {list(wanted)}")
        else:
            sources[weight.stock] = held
    known = {weight.stock for weight in table.weights} | set(table.copies) | set(table.also_written)
    extra = [
        name
        for name in sorted(set(shapes) - known)
        if not any(re.fullmatch(pattern, name) for pattern in table.ignored)
    ]
    faults = [fault("missing", missing), fault("not known", extra), fault("of another shape", mis_shaped)]
    if any(faults):
        raise CheckpointError(f"{folder}: the weights do not fit its config: {'; '.join(filter(None, faults))}")
    return sources


def first_names(names: Iterable[str]) -> str:
    """Names for an error: the first ones, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f"{', '.join(names[:_LISTED])}{more}"


def fault(what: str, names: Iterable[str]) -> str:
    """One kind of fault for an error, such as `2 missing: a, b`; empty without names."""
    names = list(names)
    return f"{len(names)} {what}: {first_names(names)}" if names else ""


def _check_copies(table: WeightTable, files: TensorFiles, shapes: Mapping[str, tuple[int, ...]]) -> None:
    for copy, source in table.copies.items():
        if copy in shapes and source in shapes and not torch.equal(files.read(copy), files.read(source)):
            raise CheckpointError(f"{files.folder}: {copy} must equal {source}, to which it is tied, but it does not")


def stock_weights(network: nn.Module, table: WeightTable) -> dict[str, Tensor]:
    """A network's tensors under their stock names, on the CPU.

    Raises:
        CheckpointError: the network holds other tensors than its table says (adapters not merged, say).
    """
    state = network.state_dict()
    named = [name for weight in table.weights for name in weight.ours]
    faults = [
        fault("not in the format", sorted(set(state) - set(named))),
        fault("missing", sorted(set(named) - set(state))),
    ]
    if any(faults):
        raise CheckpointError(
            f"the network cannot be saved as it is, merge or remove adapters first: {'; '.join(filter(None, faults))}"
        )
    tensors = {
        weight.stock: weight.to_stock([state[name].detach().cpu() for name in weight.ours]).clone().contiguous()
        for weight in table.weights
    }
    return tensors | {name: tensors[source].clone() for name, source in table.also_written.items()}


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write a file to, in a folder that is made; it takes its own name when it is complete, or is removed.

    Raises:
        CheckpointError: the disk refuses.
    """
    part = path.with_name(f"{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        os.replace(part, path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be written ({getattr(error, 'strerror', None) or error})") from error
    finally:
        if path.parent.is_dir():
            part.unlink(missing_ok=True)


def write_folder(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write `config.json` and `model.safetensors`; each file is complete or not there.

    Raises:
        CheckpointError: the disk refuses.
    """
    with replacing(folder / "config.json") as config_part, replacing(folder / "model.safetensors") as weights_part:
        config_part.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        save_file(dict(tensors), weights_part, metadata={"format": "pt"})
