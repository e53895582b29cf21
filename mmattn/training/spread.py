"""Models whose training is spread over the processes in pieces, whichever way they are cut."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from accelerate import Accelerator
from torch import Tensor, nn

from mmattn.training.activation_checkpointing import ActivationCheckpointing
from mmattn.training.config import TrainingConfig
from mmattn.training.ema import assign
from mmattn.training.layer_compilation import LayerCompilation
from mmattn.training.prepared import PreparedModel
from mmattn.training.state import FullState, frozen_checksum, trained_tensors
from mmattn.training.task import Task


class SpreadModel(PreparedModel):
    """A copy of the task's model is trained in pieces. The main process keeps the task's own module, on the CPU, and
    fills it before evaluations and saves; the others cut theirs in place.

    Args:
        task: Of the run.
        config: The settings.
        accelerator: Of the run.
    """

    def __init__(self, task: Task, config: TrainingConfig, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self.plain = task.model.cpu()
        self.frozen_checksum = frozen_checksum(self.plain)
        self._to_cut: nn.Module = copy.deepcopy(self.plain) if accelerator.is_main_process else self.plain
        self._compilation = LayerCompilation(task, self._to_cut) if config.torch_compile else None
        self._checkpointing = ActivationCheckpointing(task, self._to_cut) if config.activation_checkpointing else None

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

    def close(self) -> None:
        """The pieces stay as they are."""
        # In this order: the one that is put on last is taken off first.
        if self._checkpointing is not None:
            self._checkpointing.undo()
        if self._compilation is not None:
            self._compilation.undo()
