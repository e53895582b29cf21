"""`best/` and `final/`, the models of a run beside its checkpoints: which is the best, and whether they are up to date.

Sharded checkpoints hold no model; a run that writes them publishes none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from mmattn.training.checkpoint import CheckpointStore, model_folder
from mmattn.training.state import read_facts
from mmattn.training.task import Task

PUBLISHED = ("best", "final")


def is_better(task: Task, metrics: Mapping[str, float], best_value: float | None) -> bool:
    """Whether an evaluation is better than the best so far, by the metric that the task names.

    Raises:
        KeyError: that metric is not among them (see `missing_best`).
    """
    value = metrics[task.best] if task.best is not None else None
    sign = 1 if task.is_higher_better else -1
    return value is not None and math.isfinite(value) and (best_value is None or sign * value > sign * best_value)


def missing_best(task: Task, metrics: Mapping[str, float], step: int) -> str:
    """What to tell the user of an evaluation without the metric that the task names; empty where it is there."""
    if task.best is None or task.best in metrics:
        return ""
    return (
        f"evaluation gave no {task.best!r}, by which the best is chosen: name one of {list(metrics)}, and go on from "
        f"step {step}, which is saved, with --resume"
    )


def publish_best(store: CheckpointStore, step: int) -> str:
    """Copy the model of the best step's checkpoint to `best/`; what to tell the user where there is none.

    Raises:
        RunError: when the disk is full or cannot be written.
    """
    checkpoint = store.path(step)
    model = model_folder(checkpoint)
    if model is not None:
        store.publish(model, "best")
        return ""
    if not checkpoint.exists():
        return f"best/ is not of the best step, {step}: {checkpoint} has gone"
    return f"best/ is not of the best step, {step}, whose checkpoint is sharded: {_by_export(checkpoint)}"


def how_to_export(store: CheckpointStore) -> str:
    """What to tell the user at the end of a run with sharded checkpoints."""
    found = [f"{name}/" for name in PUBLISHED if (store.output_dir / name).is_dir()]
    are = "is" if len(found) == 1 else "are"
    old = f"; {' and '.join(found)} {are} of an earlier part of the run" if found else ""
    return f"the checkpoints are sharded: {_by_export(store.output_dir)}{old}"


def _by_export(source: Path) -> str:
    return f"make a model by mmattn export {source} FOLDER"


def is_outdated(run: Path) -> bool:
    """Whether `best/` and `final/` of a run's folder, if there are any, lack what its checkpoints hold: the newest, or
    that of the best step, is sharded.

    Raises:
        CheckpointError: the newest checkpoint was written in another format.
    """
    store = CheckpointStore(run)
    steps = store.steps()
    if not steps:
        return False
    newest = store.path(steps[-1])
    best = store.path(read_facts(newest)["best_step"] or steps[-1])
    return any(path.exists() and model_folder(path) is None for path in (newest, best))
