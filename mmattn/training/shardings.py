"""The model of a run, by `training.sharding`."""

from __future__ import annotations

from contextlib import ExitStack

from accelerate import Accelerator

from mmattn.training.config import TrainingConfig
from mmattn.training.prepared import PreparedModel, WholeModel
from mmattn.training.sharding import ShardedModel
from mmattn.training.task import Task
from mmattn.training.zero3 import PartitionedModel


def prepare_model(
    sharding: str, task: Task, config: TrainingConfig, accelerator: Accelerator, closing: ExitStack
) -> PreparedModel:
    """As `resolve_sharding` says; what is put around the model is taken off it as `closing` closes.

    Raises:
        UsageError: when the model cannot be prepared so.
    """
    kinds = {"none": WholeModel, "fsdp2": ShardedModel, "zero3": PartitionedModel}
    return kinds[sharding](task, config, accelerator, closing)
