"""Models whose training is spread over the processes in pieces, whichever way they are cut."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

from accelerate import Accelerator
from torch import Tensor, nn

from mmattn.training.config import TrainingConfig
from mmattn.training.ema import assign
from mmattn.training.prepared import PreparedModel, wrap_layers
from mmattn.training.state import FullState, frozen_checksum, trained_tensors
from mmattn.training.task import Task


class SpreadModel(PreparedModel):
    """A copy of the task's model is trained in pieces. The main process keeps the task's own module, on the CPU, and
    fills it before evaluations and saves; the others cut theirs in place.

    Args:
        task: Of the run.
        config: The settings.
        accelerator: Of the run.
        closing: What the run puts around the layers is taken off them as this closes; the pieces stay as they are.
    """

    def __init__(self, task: Task, config: TrainingConfig, accelerator: Accelerator, closing: ExitStack) -> None:
        self._accelerator = accelerator
        self.plain = task.model.cpu()
        self.frozen_checksum = frozen_checksum(self.plain)
        self._to_cut: nn.Module = copy.deepcopy(self.plain) if accelerator.is_main_process else self.plain
        wrap_layers(task, self._to_cut, config, closing)

    def _on_main(self, tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """Copies on the CPU, on the main process; every process goes through all of them, as they are gathered."""
        kept = {}
        for name, value in tensors:
            if self._accelerator.is_main_process:
                kept[name] = value.detach().to("cpu", copy=True)
        return kept

    def to_hold(self, full: FullState) -> dict[str, Tensor]:
        """All that is trained."""
        return full.trained | (full.average or {})

    @contextmanager
    def holding(self, tensors: dict[str, Tensor]) -> Iterator[None]:
        """Afterwards the module is on the CPU again, with the tensors that it was given."""
        targets = trained_tensors(self.plain)
        assign({name: targets[name] for name in tensors}, tensors)
        self.plain.to(self._accelerator.device)
        try:
            yield
        finally:
            self.plain.cpu()
