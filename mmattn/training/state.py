"""What a checkpoint holds besides the model folder: everything that the next step depends on.

Random numbers need no state: dropout is seeded anew in every step from (seed, step, process).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor, nn

from mmattn._optional import package_version
from mmattn.errors import CheckpointError
from mmattn.training.ema import ParameterAverage
from mmattn.training.optim import load_optimizer_tensors, trainable_parameters
from mmattn.training.tensor_rows import TensorFiles, own_rows

FORMAT = 1
STATE_FILE = "state.json"
TRAINED, OPTIMIZER, AVERAGE = TENSOR_KINDS = ("trained", "optimizer", "average")
TRAINED_FILE = f"{TRAINED}.safetensors"
_INTEGER_OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_PACKAGES = ("mmattn", "torch", "transformers", "diffusers", "accelerate", "datasets", "peft", "safetensors", "numpy")


@dataclass
class LoopState:
    """Where a run stands. `step` counts batches taken, skipped ones too, and so the schedule."""

    step: int = 0
    examples: int = 0
    tokens: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    best_step: int | None = None
    best_value: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    average_updates: int = 0
    scaler: dict[str, Any] | None = None
    is_evaluation_due: bool = False  # a signal has ended the one after this step: it is made first when going on


@dataclass(frozen=True)
class FullState:
    """The whole tensors of a run by name.

    Attributes:
        trained: See `trained_tensors`.
        optimizer: See `optim.optimizer_tensors`.
        average: Averages of the parameters, None without.
    """

    trained: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    average: dict[str, Tensor] | None


def stored_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that belong to the model's state (batch norm's statistics), by name."""
    kept = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in kept}


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What training changes: the trainable parameters and the stored buffers, by name."""
    return {**trainable_parameters(model), **stored_buffers(model)}


def trained_dtypes(model: nn.Module) -> str:
    """The data types of the parameters that are trained: `float32`, or several, by name."""
    found = {str(parameter.dtype).removeprefix("torch.") for parameter in trainable_parameters(model).values()}
    return ", ".join(sorted(found))


def frozen_checksum(model: nn.Module) -> str:
    """A fingerprint of the parameters that are not trained: equal on every device, in any order of summation."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            bits = parameter.detach().contiguous().view(_INTEGER_OF_SIZE[parameter.element_size()]).view(-1)
            digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype} {_bit_sum(bits)};".encode())
    return digest.hexdigest()


def _bit_sum(bits: Tensor) -> list[int]:
    # Weighted by place, modulo 2**64, so that exchanged values show.
    sums = []
    for part in bits.split(1 << 22):
        places = torch.arange(1, len(part) + 1, device=part.device)
        sums.append(int((part.long() * places).sum()))
    return sums


def write_tensors(folder: Path, full: FullState) -> None:
    """Write the whole tensors of a run, a file a kind."""
    for kind, tensors in zip(TENSOR_KINDS, (full.trained, full.optimizer, full.average), strict=True):
        if tensors is not None:
            _save_tensors(tensors, folder / f"{kind}.safetensors")


def write_state(folder: Path, state: LoopState, facts: dict[str, Any]) -> None:
    """Write the loop's state but for its tensors."""
    (folder / STATE_FILE).write_text(
        json.dumps({"format": FORMAT, **dataclasses.asdict(state), **facts}, indent=1) + "\n"
    )


def read_facts(folder: Path) -> dict[str, Any]:
    """The JSON part of a checkpoint's state.

    Raises:
        CheckpointError: when it was written in another format, or is not where this process looks for it.
    """
    try:
        content = json.loads((folder / STATE_FILE).read_text())
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{folder / STATE_FILE} is not there for this process: with several machines all of them have to see "
            "output_dir, on a file system that they share"
        ) from error
    if content.get("format") != FORMAT:
        raise CheckpointError(
            f"{folder} has checkpoint format {content.get('format')}, this version of mmattn reads {FORMAT}"
        )
    return content


def read_loop_state(folder: Path) -> LoopState:
    """A checkpoint's state but for its tensors.

    Raises:
        CheckpointError: when it was written in another format.
    """
    content = read_facts(folder)
    known = {field.name for field in dataclasses.fields(LoopState)}
    return LoopState(**{name: value for name, value in content.items() if name in known})


def read_state(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, average: ParameterAverage | None
) -> LoopState:
    """Put a checkpoint's tensors back in place, those rows of each that this process holds; the state beside them.

    Raises:
        CheckpointError: when the checkpoint's trained tensors are not those of the model, or a piece is missing.
    """
    state = read_loop_state(folder)
    trained, parameters = trained_tensors(model), trainable_parameters(model)
    read_trained(folder, trained)
    with TensorFiles(folder, OPTIMIZER) as files:
        owners = {name: parameters.get(name.partition(".")[2]) for name in files.shapes}
        own = {name: _own(files, name, owner) for name, owner in owners.items() if owner is not None}
        load_optimizer_tensors(optimizer, parameters, own)
    if average is not None:
        if TensorFiles.exist(folder, AVERAGE):
            with TensorFiles(folder, AVERAGE) as files:
                averages = {name: _own(files, name, trained[name]) for name in average.averages}
            average.load(averages, state.average_updates)
        else:  # a run continued elsewhere that had no average: it starts from the weights
            average.restart()
    return state


@torch.no_grad()
def read_trained(folder: Path, targets: dict[str, Tensor], kind: str = TRAINED) -> None:
    """Fill tensors from those of the same names in a checkpoint: for each the rows that this process holds.

    Args:
        folder: The checkpoint.
        targets: The `trained_tensors` of a model.
        kind: `TRAINED`; or `AVERAGE`, which leaves those alone that are not averaged, integers.

    Raises:
        CheckpointError: when the names or shapes differ.
    """
    with TensorFiles(folder, kind) as files:
        if kind == AVERAGE:
            targets = {name: target for name, target in targets.items() if target.is_floating_point()}
        require_same_shapes({name: tuple(target.shape) for name, target in targets.items()}, files.shapes, folder)
        for name, target in targets.items():
            files.read_into(target, name)


def _own(files: TensorFiles, name: str, like: Tensor) -> Tensor:
    rows = own_rows(like)
    return files.read(name, rows.first, rows.local.shape[0]) if rows.shape and files.shapes[name] else files.read(name)


def write_run_facts(
    folder: Path, command: str, training: dict[str, Any], resolved_config: dict[str, Any] | None
) -> None:
    """Write how the run was made: `run.json` (command line, versions, settings) and `config.yaml`."""
    versions = {name: version for name in _PACKAGES if (version := package_version(name)) is not None}
    facts = {
        "command": command,
        "versions": {"python": platform.python_version(), **versions},
        "platform": platform.platform(),
        "training": training,
    }
    (folder / "run.json").write_text(json.dumps(facts, indent=1) + "\n")
    if resolved_config is not None:
        (folder / "config.yaml").write_text(yaml.safe_dump(resolved_config, sort_keys=False, allow_unicode=True))


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    # Copies, for two names may share memory, which safetensors refuses.
    save_file({name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}, path)


def require_same_shapes(wanted: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]], folder: Path) -> None:
    """Check that a checkpoint's tensors are those of the model.

    Args:
        wanted: Shapes by name of what the model trains.
        found: Those of the checkpoint.
        folder: The checkpoint.

    Raises:
        CheckpointError: when the names or shapes differ.
    """
    missing, extra = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    shapes = [
        f"{name} {found[name]} instead of {shape}"
        for name, shape in wanted.items()
        if name in found and found[name] != shape
    ]
    if missing or extra or shapes:
        raise CheckpointError(
            f"{folder} was written for another model or another choice of what to train: "
            f"missing {missing[:5]}, unexpected {extra[:5]}, wrong shapes {shapes[:5]}"
        )
