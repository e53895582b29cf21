"""Checkpoints that every process writes its part of: for models whose whole state is too much for one process."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

from accelerate import Accelerator
from safetensors import SafetensorError

from mmattn._durable import sync_file
from mmattn.errors import RunError
from mmattn.training.checkpoint import CheckpointStore
from mmattn.training.devices import on_every, on_main
from mmattn.training.sharding import ShardedModel
from mmattn.training.tensor_rows import write_rows


def save_sharded(
    accelerator: Accelerator,
    store: CheckpointStore,
    step: int,
    prepared: ShardedModel,
    write_rest: Callable[[Path], None],
) -> Path:
    """Save a checkpoint, complete or absent; every process has to call it, and all have to see the same folder.

    Args:
        accelerator: Of the run.
        store: Of the run.
        step: The step.
        prepared: The model.
        write_rest: Writes what is no tensor; called on the main process.

    Raises:
        RunError: on every process, when one of them could not write; earlier checkpoints are untouched.
    """
    folder = Path(on_main(accelerator, lambda: str(store.begin(step))))
    try:
        written = on_every(accelerator, functools.partial(_write_own, accelerator, store, step, prepared, folder))
        sizes = [size for sizes in written for size in sizes]
        on_main(accelerator, functools.partial(_write_rest, store, step, folder, sizes, write_rest))
    except RunError:
        if accelerator.is_main_process:
            store.abandon(step)
        raise
    return Path(on_main(accelerator, lambda: str(store.finish(step))))


def _write_own(
    accelerator: Accelerator, store: CheckpointStore, step: int, prepared: ShardedModel, folder: Path
) -> list[tuple[str, int]]:
    part, parts = accelerator.process_index, accelerator.num_processes
    try:
        paths = [write_rows(rows, folder, kind, part, parts) for kind, rows in prepared.own_state().items()]
        for path in paths:
            sync_file(path)
        return [(path.name, path.stat().st_size) for path in paths]
    except (OSError, SafetensorError) as error:
        raise RunError(f"process {part}: {store.failure(store.path(step), error)}") from error


def _write_rest(
    store: CheckpointStore, step: int, folder: Path, written: list[tuple[str, int]], write_rest: Callable[[Path], None]
) -> None:
    with store.failing_as_a_whole(step):
        # On several machines a file is seen late, or never.
        paths = {folder / name: size for name, size in written}
        missing = [path.name for path, size in paths.items() if not path.exists() or path.stat().st_size != size]
        if missing:
            raise RunError(
                f"cannot save {folder}: {missing[0]} was written by another process, and the main process does not see "
                "it: output_dir has to be on a file system that all machines share"
            )
        write_rest(folder)
