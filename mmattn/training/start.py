"""Where a run starts: from nothing, from its newest checkpoint, or in a new folder from another run's checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmattn.errors import UsageError
from mmattn.training.checkpoint import MANIFEST, CheckpointStore, verify_checkpoint
from mmattn.training.config import (
    CACHE_FOLDER,
    ROUNDING_KEYS,
    SAMPLES_FOLDER,
    TRACKER_FOLDER,
    TrainingConfig,
    config_dict,
    config_differences,
    maths_keys,
)
from mmattn.training.metrics import METRICS_FILE
from mmattn.training.recipe_settings import RecipeChanges
from mmattn.training.window_sampler import stream_differences

LOCK_FILE = ".lock"


@dataclass
class Start:
    """The checkpoint to start from, if any; whether it continues the run of this folder; what to tell the user."""

    checkpoint: Path | None = None
    is_continued: bool = False
    remarks: list[str] = field(default_factory=list)


def find_start(store: CheckpointStore, resume: bool | str | Path) -> Start:
    """Decide where to start. Nothing is deleted but the leftovers of an interrupted save.

    Raises:
        UsageError: for a folder that holds something and no `resume`, or `resume` without a complete checkpoint, or
            from an older checkpoint of the same folder.
    """
    if resume is False:
        return Start(remarks=_require_free(store))
    if resume is True:
        store.clean()
        checkpoint, problems = store.latest()
        if checkpoint is None:
            damaged = f" (damaged: {'; '.join(problems)})" if problems else ""
            raise UsageError(
                f"nothing to resume: {store.output_dir} holds no complete checkpoint{damaged}; start without --resume"
            )
        return Start(checkpoint, True, [f"ignored, not a complete checkpoint: {problem}" for problem in problems])
    return _start_from(store, Path(resume))


def _start_from(store: CheckpointStore, path: Path) -> Start:
    if (path / MANIFEST).exists():
        verify_checkpoint(path)
        checkpoint = path
    else:
        found, _ = CheckpointStore(path).latest()
        if found is None:
            raise UsageError(f"nothing to resume: {path} is no complete checkpoint and no folder of a run")
        checkpoint = found
    if checkpoint.resolve().parent != store.folder.resolve():
        return Start(checkpoint, False, [*_require_free(store), f"a new run from {checkpoint}"])
    newest, _ = store.latest()
    if newest is not None and newest.name != checkpoint.name:
        raise UsageError(
            f"{checkpoint} is older than {newest.name} of the same run: to start again from it, "
            "choose another output_dir"
        )
    return find_start(store, True)


def _require_free(store: CheckpointStore) -> list[str]:
    folder = store.output_dir
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"output_dir {folder} is a file")
    names = {path.name for path in folder.iterdir()} - {LOCK_FILE, CACHE_FOLDER} if folder.exists() else set()
    if not names:
        return []
    kept = [path.name for path in store.folder.glob("*") if not path.name.startswith(".tmp-")]
    expected = {METRICS_FILE, TRACKER_FOLDER, SAMPLES_FOLDER, store.folder.name}
    if METRICS_FILE in names and not kept and names <= expected:
        store.clean()
        return [f"{folder} holds a run that ended before its first checkpoint: it is started again"]
    if kept:
        raise UsageError(
            f"output_dir {folder} already holds a run ({sorted(kept)[-1]}): "
            "continue it with --resume, or choose another output_dir"
        )
    raise UsageError(f"output_dir {folder} is not empty: choose another output_dir, or move its files away")


def check_continuation(
    start: Start, saved: dict[str, Any], facts: dict[str, Any], config: TrainingConfig, recipe: RecipeChanges
) -> list[str]:
    """Compare a checkpoint's facts with this run's; what to tell the user.

    Raises:
        UsageError: when a run would be continued in its own folder with other mathematics.
    """
    new = config_dict(config)
    # What a run knew nothing of was as it is by default.
    old = config_dict(TrainingConfig(config.output_dir)) | saved["training"]
    saved = {"sharding": "none", "dtype": facts["dtype"], "arithmetic": facts["arithmetic"], **saved}
    changed = config_differences(old, new, maths_keys(config))
    changed += config_differences(saved, facts, ("num_examples", "lengths_checksum", "frozen_checksum", "dtype"))
    changed += stream_differences(saved.get("stream"), facts["stream"])
    changed += recipe.changed
    if changed and start.is_continued:
        raise UsageError(
            f"cannot resume {config.output_dir} with other settings ({'; '.join(changed)}): restore them, or start "
            f"a new run in another output_dir with --resume-from {start.checkpoint}"
        )
    remarks = [*(f"differs from the checkpoint: {change}" for change in changed), *recipe.remarks]
    if saved["step"] > config.max_steps:
        raise UsageError(f"{start.checkpoint} is at step {saved['step']}, beyond max_steps {config.max_steps}")
    rounding = config_differences(old, new, ROUNDING_KEYS)
    rounding += config_differences(saved, facts, ("arithmetic", "num_processes", "sharding"))
    remarks += [f"changed, so losses agree to rounding only: {change}" for change in rounding]
    horizon = config_differences(old, new, ("max_steps",))
    if horizon:
        bent = ", and with it the learning rate from here on" if config.schedule == "cosine" else ""
        remarks.append(f"changed{bent}: {horizon[0]}")
    return remarks
