"""A model folder out of a checkpoint, or of a whole run."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from mmattn.errors import CheckpointError, RunError, UsageError
from mmattn.training.checkpoint import MANIFEST, CheckpointStore, model_folder, verify_checkpoint
from mmattn.training.publish import PUBLISHED, is_outdated
from mmattn.training.state import AVERAGE, frozen_checksum, read_facts, read_trained, trained_tensors
from mmattn.training.task import Task
from mmattn.training.tensor_rows import TensorFiles


def exported_part(source: Path) -> Path:
    """What is to be exported: a checkpoint; of a run's folder `best/`, else `final/`, else the checkpoint of the best
    step if it is kept, else the newest. `best/` and `final/` that lack what sharded checkpoints hold are passed over.

    Raises:
        CheckpointError: neither a checkpoint nor the folder of a run, or a damaged one.
    """
    if (source / MANIFEST).exists():
        verify_checkpoint(source)
        return source
    if not (source / "checkpoints").is_dir():
        raise CheckpointError(
            f"{source}: no checkpoint here: give the output_dir of a run, or one of its checkpoints/step-*"
        )
    published = [] if is_outdated(source) else [source / name for name in PUBLISHED if (source / name).is_dir()]
    if published:
        return published[0]
    store = CheckpointStore(source)
    newest, problems = store.latest()
    if newest is None:
        damaged = f" ({'; '.join(problems)})" if problems else ""
        raise CheckpointError(f"{source}: holds no complete checkpoint to export{damaged}")
    best_step = read_facts(newest)["best_step"]
    if best_step is None or not store.path(best_step).exists():
        return newest
    verify_checkpoint(store.path(best_step))
    return store.path(best_step)


def export_model(part: Path, target: Path, make_task: Callable[[], Task]) -> Path:
    """Write the model of a checkpoint, or of `best/` and `final/`, into a new folder, complete or absent.

    A sharded checkpoint is put together in the model of the task that was trained; the moving average is taken where
    the run kept one, as `best/` and `final/` do.

    Args:
        part: From `exported_part`.
        target: A folder that does not exist.
        make_task: The task, called for a sharded checkpoint only.

    Returns:
        The target.

    Raises:
        UsageError: the target exists, or the folder that it is to lie in does not.
        CheckpointError: a checkpoint that does not fit the task, or of which a piece is missing.
        RunError: the disk is full or cannot be written.
    """
    if target.exists():
        raise UsageError(f"{target} exists: nothing was written, choose another folder")
    if not target.parent.is_dir():
        raise UsageError(f"{target}: the folder {target.parent} does not exist; make it first")
    folder = model_folder(part) if (part / MANIFEST).exists() else part
    temporary = target.with_name(f".tmp-{target.name}")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        if folder is not None:
            shutil.copytree(folder, temporary)
        else:
            temporary.mkdir()
            _save_merged(part, temporary, make_task())
        os.rename(temporary, target)
    except (OSError, SafetensorError) as error:
        raise RunError(f"cannot write {target}: {' '.join(str(error).split())}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _save_merged(checkpoint: Path, folder: Path, task: Task) -> None:
    targets = trained_tensors(task.model)
    if frozen_checksum(task.model) != read_facts(checkpoint)["frozen_checksum"]:
        raise CheckpointError(
            f"{checkpoint} was trained beside other frozen weights than this config opens now: restore the model that "
            "the run started from"
        )
    read_trained(checkpoint, targets)
    if TensorFiles.exist(checkpoint, AVERAGE):
        read_trained(checkpoint, targets, AVERAGE)
    task.model.eval()
    task.save(task.model, folder)
