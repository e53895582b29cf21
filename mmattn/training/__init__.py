"""The one training loop that every recipe uses."""

from mmattn.training.averaging import average_checkpoints
from mmattn.training.checkpoint import latest_checkpoint, verify_checkpoint
from mmattn.training.config import TrainingConfig
from mmattn.training.loop import TrainingResult, train
from mmattn.training.metrics import read_metrics
from mmattn.training.signals import TrainingStoppedError
from mmattn.training.task import Batch, Draw, Loss, Task

__all__ = [
    "Batch",
    "Draw",
    "Loss",
    "Task",
    "TrainingConfig",
    "TrainingResult",
    "TrainingStoppedError",
    "average_checkpoints",
    "latest_checkpoint",
    "read_metrics",
    "train",
    "verify_checkpoint",
]
