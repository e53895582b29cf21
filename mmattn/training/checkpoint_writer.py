"""A run's checkpoints as they are written: a step's once, whole or in shards, and the older ones pruned."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from mmattn.training.averaging import LastCheckpoints
from mmattn.training.checkpoint import CheckpointStore
from mmattn.training.config import TrainingConfig
from mmattn.training.devices import on_main
from mmattn.training.metrics import RunLog
from mmattn.training.prepared import PreparedModel
from mmattn.training.sharded_state import save_sharded
from mmattn.training.sharding import ShardedModel
from mmattn.training.state import FullState, LoopState, write_run_facts, write_state, write_tensors
from mmattn.training.task import Task


@dataclass(frozen=True)
class RunFacts:
    """What every checkpoint says of its run.

    Attributes:
        command: The command line.
        resolved_config: The recipe's whole configuration.
        compared: What a run that goes on from it is compared with; `training` are the settings.
    """

    command: str
    resolved_config: dict[str, Any] | None
    compared: dict[str, Any]


class CheckpointWriter:
    """Saves a run after a step; every process has to call it.

    Args:
        task: Of the run.
        config: The settings.
        accelerator: Of the run.
        store: Where the checkpoints lie.
        prepared: The model and the optimiser.
        last_checkpoints: Those that are to be averaged, which stay; None: there is no average of them.
        facts: What every checkpoint says of the run.

    Attributes:
        saved_step: The step whose checkpoint is complete and knows everything of it; None: no step's is.
    """

    def __init__(
        self,
        task: Task,
        config: TrainingConfig,
        accelerator: Accelerator,
        store: CheckpointStore,
        prepared: PreparedModel,
        last_checkpoints: LastCheckpoints | None,
        facts: RunFacts,
    ) -> None:
        self.task, self.config, self.accelerator, self.store = task, config, accelerator, store
        self.prepared, self.last_checkpoints, self.facts = prepared, last_checkpoints, facts
        self.saved_step: int | None = None

    def save(self, state: LoopState, log: RunLog) -> None:
        """Write the checkpoint of `state.step`, unless it is there; the log's lines up to it are on the disk before.

        Raises:
            RunError: the disk is full or cannot be written; the older checkpoints are as they were.
        """
        if self.saved_step == state.step:
            return
        if self.prepared.average is not None:
            state.average_updates = self.prepared.average.updates
        if self.accelerator.scaler is not None:
            state.scaler = self.accelerator.scaler.state_dict()
        on_main(self.accelerator, lambda: self._sync(log, state.step))
        if isinstance(self.prepared, ShardedModel) and self.config.sharded_checkpoints:
            write_facts = functools.partial(self._write_facts, state)
            save_sharded(self.accelerator, self.store, state.step, self.prepared, write_facts)
        else:
            write = functools.partial(self._write_whole, state, self.prepared.full_state())
            on_main(self.accelerator, lambda: self.store.save(state.step, write))
        on_main(self.accelerator, lambda: self._prune(state))
        self.saved_step = state.step

    def _sync(self, log: RunLog, step: int) -> None:
        with self.store.failing_as_a_whole(step):
            log.sync()

    def _write_whole(self, state: LoopState, full: FullState, folder: Path) -> None:
        write_tensors(folder, full)
        self._write_facts(state, folder)
        (folder / "model").mkdir()
        with self.prepared.holding(self.prepared.to_hold(full)):
            self.task.save(self.prepared.plain, folder / "model")

    def _write_facts(self, state: LoopState, folder: Path) -> None:
        compared = self.facts.compared
        write_state(folder, state, compared)
        write_run_facts(folder, self.facts.command, compared["training"], self.facts.resolved_config)

    def _prune(self, state: LoopState) -> None:
        kept = {state.best_step} if state.best_step is not None else set()
        if self.last_checkpoints is not None:
            kept.update(self.last_checkpoints.until(state.step))
        self.store.prune(self.config.keep_last, kept)
