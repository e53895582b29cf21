"""The mean of the weights of several checkpoints, of any models or of the last ones of a run.

Averaging the last checkpoints is what Vaswani et al. (arXiv 1706.03762, section 6.1) did for their translations.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mmattn.errors import CheckpointError, UsageError
from mmattn.training.checkpoint import MANIFEST, CheckpointStore, verify_checkpoint
from mmattn.training.config import TrainingConfig
from mmattn.training.state import TRAINED_FILE

_OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack")
_COUNTER = "num_batches_tracked"  # batch norm's: nothing but a count of the steps


def average_checkpoints(sources: Sequence[Path | str], target: Path | str) -> Path:
    """Write the mean of the weights of several models, each element's in float64.

    Integer tensors must agree in all of them, but for batch norm's `num_batches_tracked`, which is the last source's.

    Args:
        sources: Model folders, in the order of their steps; for checkpoint folders of a run the `model/` in them. All
            their `.safetensors` files are averaged, every other file is the last source's. Or all `.safetensors` files.
        target: The folder, or file, to be written, which must not exist.

    Returns:
        The target.

    Raises:
        UsageError: no sources, files and folders mixed, or a target that exists.
        CheckpointError: a source without weights or with weights of another format; tensors whose names, shapes or
            dtypes differ; integers that differ; a damaged checkpoint.
    """
    paths, target = [_model_path(Path(source)) for source in sources], Path(target)
    if not paths:
        raise UsageError("nothing to average: name at least one model folder or .safetensors file")
    if len({path.is_dir() for path in paths}) > 1:
        raise UsageError("cannot average folders with files: name folders only, or .safetensors files only")
    if target.exists():
        raise UsageError(f"{target} exists: choose another target for the average")
    if paths[0].is_file():
        averaged = {target: _averaged_file(paths)}
    else:
        names = _common_files(paths)
        averaged = {target / name: _averaged_file([path / name for path in paths]) for name in names}
        shutil.copytree(paths[-1], target, ignore=shutil.ignore_patterns("*.safetensors"))
    for path, (tensors, metadata) in averaged.items():
        save_file(tensors, path, metadata=metadata)
    return target


def average_tensors(files: Sequence[Path]) -> dict[str, Tensor]:
    """The mean of `.safetensors` files, as `average_checkpoints` takes it.

    Raises:
        CheckpointError: tensors whose names, shapes or dtypes differ, or integers that differ.
    """
    return _averaged_file(files)[0]


def _model_path(source: Path) -> Path:
    if source.is_dir():
        if (source / MANIFEST).exists():
            verify_checkpoint(source)
            return source / "model"
        return source
    if not source.exists():
        raise CheckpointError(f"cannot average {source}: there is no such folder or file")
    if source.suffix != ".safetensors":
        raise CheckpointError(f"cannot average {source}: it is no folder and no .safetensors file")
    return source


def _common_files(folders: Sequence[Path]) -> list[str]:
    found = []
    for folder in folders:
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        others = [path.relative_to(folder).as_posix() for path in files if path.suffix in _OTHER_WEIGHTS]
        if others:
            raise CheckpointError(
                f"cannot average {folder}: {', '.join(others[:5])} may hold weights, and only .safetensors are "
                "averaged: convert or move such files"
            )
        found.append([path.relative_to(folder).as_posix() for path in files if path.suffix == ".safetensors"])
        if not found[-1]:
            raise CheckpointError(f"cannot average {folder}: it holds no .safetensors file")
        if found[-1] != found[0]:
            raise CheckpointError(
                f"cannot average {folder} with {folders[0]}: their weights lie in other files, {found[-1][:5]} and "
                f"{found[0][:5]}"
            )
    return found[0]


def _averaged_file(paths: Sequence[Path]) -> tuple[dict[str, Tensor], dict[str, str] | None]:
    with ExitStack() as stack:
        try:
            files = [stack.enter_context(safe_open(path, framework="pt")) for path in paths]
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"cannot average {', '.join(map(str, paths))}: {error}") from error
        for path, file in zip(paths[1:], files[1:], strict=True):
            _require_alike(paths[0], files[0], path, file)
        return {name: _mean(name, paths, files) for name in files[0].keys()}, files[-1].metadata()  # noqa: SIM118


def _require_alike(first_path: Path, first: Any, path: Path, file: Any) -> None:
    names, own = set(first.keys()), set(file.keys())
    forms = [
        f"{name} {other[1]} {other[0]} instead of {one[1]} {one[0]}"
        for name in sorted(names & own)
        if (one := _form(first, name)) != (other := _form(file, name))
    ]
    if names != own or forms:
        raise CheckpointError(
            f"cannot average {path} with {first_path}: missing {sorted(names - own)[:5]}, unexpected "
            f"{sorted(own - names)[:5]}, of another form {forms[:5]}"
        )


def _form(file: Any, name: str) -> tuple[tuple[int, ...], str]:
    view = file.get_slice(name)
    return tuple(view.get_shape()), view.get_dtype()


def _mean(name: str, paths: Sequence[Path], files: Sequence[Any]) -> Tensor:
    last = files[-1].get_tensor(name)
    if last.is_floating_point():
        total = torch.zeros(last.shape, dtype=torch.float64)
        for file in files:
            total += file.get_tensor(name)
        return (total / len(files)).to(last.dtype)
    if name.rpartition(".")[2] != _COUNTER:
        for path, file in zip(paths, files, strict=True):
            if not torch.equal(file.get_tensor(name), last):
                raise CheckpointError(
                    f"cannot average {path} with {paths[-1]}: {name} ({last.dtype}) is no floating-point tensor, and "
                    "differs"
                )
    return last


class LastCheckpoints:
    """The checkpoints of a run whose mean becomes `final/`: the last `average_last` at multiples of `save_every`.

    Those saved between, at a best evaluation or a signal, are not among them: a run in pieces averages what an unbroken
    one does.
    """

    def __init__(self, store: CheckpointStore, config: TrainingConfig) -> None:
        self.store, self.number, self.every = store, config.average_last, config.save_every
        self.steps = self.until(config.max_steps)

    def until(self, step: int) -> list[int]:
        """The steps of those that would be averaged if `step` were the last: they are not to be pruned."""
        last = step // self.every
        return [self.every * count for count in range(max(1, last - self.number + 1), last + 1)]

    def describe(self) -> str:
        """In a few words for the log."""
        return f"the average of the checkpoints of steps {', '.join(map(str, self.steps))}"

    def require(self, first_step: int) -> None:
        """Check that those before `first_step`, where this piece of the run starts, are there.

        Raises:
            UsageError: when some are not, or are sharded.
            CheckpointError: when one is damaged.
        """
        needed = {step for step in self.steps if step <= first_step}
        missing = sorted(needed - set(self.store.steps()))
        if missing:
            raise UsageError(
                f"average_last {self.number} needs the checkpoints of steps {', '.join(map(str, self.steps))}, but "
                f"{self.store.folder} has none of {', '.join(map(str, missing))}: set average_last to "
                f"{sum(step > max(missing) for step in self.steps)} or less, or raise max_steps"
            )
        for step in sorted(needed):
            self._verify(step)
            if not (self.store.path(step) / TRAINED_FILE).is_file():
                raise UsageError(
                    f"average_last {self.number} averages whole checkpoints, and {self.store.path(step)} is sharded: "
                    "set average_last to 0, or raise max_steps"
                )

    def tensors(self) -> dict[str, Tensor]:
        """The mean of what was trained and of the buffers, by name.

        Raises:
            CheckpointError: when one of the checkpoints is damaged.
        """
        for step in self.steps:
            self._verify(step)
        return average_tensors([self.store.path(step) / TRAINED_FILE for step in self.steps])

    def _verify(self, step: int) -> None:
        try:
            verify_checkpoint(self.store.path(step))
        except CheckpointError as error:
            fewer = sum(other > step for other in self.steps)
            raise CheckpointError(
                f"{error}, and average_last {self.number} needs it: set average_last to {fewer} or less and go on with "
                "--resume"
            ) from error
