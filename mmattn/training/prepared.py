"""The model and the optimiser as a run uses them; here whole in every process, in pieces in `sharding.py`
and `zero3.py`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

from accelerate import Accelerator
from torch import Tensor, nn

from mmattn.training.activation_checkpointing import ActivationCheckpointing
from mmattn.training.config import TrainingConfig
from mmattn.training.ema import ParameterAverage, replaced
from mmattn.training.gradients import Gradients
from mmattn.training.layer_compilation import LayerCompilation
from mmattn.training.optim import StepOptimizer, make_optimizer, optimizer_tensors, trainable_parameters
from mmattn.training.repeated_layers import OwnForwards
from mmattn.training.state import FullState, LoopState, frozen_checksum, read_state, trained_tensors
from mmattn.training.task import Task


class PreparedModel(ABC):
    """A task's model in a run.

    Attributes:
        model: What `Task.loss` receives.
        inner: The module in it whose parameters are trained, by the task's names for them.
        plain: The task's own module, which the main process evaluates and saves.
        optimizer: Of the trained parameters.
        gradients: Theirs.
        average: Their moving average, where this process keeps one.
        frozen_checksum: Of the model before the first step.
    """

    model: nn.Module
    inner: nn.Module
    plain: nn.Module
    optimizer: StepOptimizer
    gradients: Gradients
    average: ParameterAverage | None = None
    frozen_checksum: str

    @abstractmethod
    def full_state(self, *, has_optimizer: bool = True) -> FullState:
        """Whole tensors by name, on the main process; every process has to call it."""

    @abstractmethod
    def load(self, checkpoint: Path) -> LoopState:
        """Put a checkpoint's tensors in place; the loop's state beside them. Every process has to call it.

        Raises:
            CheckpointError: as `read_state` does.
        """

    @abstractmethod
    def to_hold(self, full: FullState) -> dict[str, Tensor]:
        """What `holding` takes to evaluate and to save a model: averages where there are some."""

    @abstractmethod
    def holding(self, tensors: dict[str, Tensor]) -> AbstractContextManager[None]:
        """Inside, the plain module is on the run's device and holds these tensors; for the main process."""

    @abstractmethod
    def describe(self) -> str:
        """How the model is spread, for the log; empty when it is whole."""


class WholeModel(PreparedModel):
    """Every process has the whole model (DDP where there are several): `plain` is what is trained.

    Args:
        task: Of the run.
        config: The settings.
        accelerator: Of the run.
        closing: What the run puts around the model is taken off it as this closes.
    """

    def __init__(self, task: Task, config: TrainingConfig, accelerator: Accelerator, closing: ExitStack) -> None:
        wrap_layers(task, task.model, config, closing)
        _give_back_later(task.model, closing)
        self._adamw = make_optimizer(task.model, config, accelerator.device)
        self.model, self.optimizer = accelerator.prepare(task.model, self._adamw)
        self.inner = self.plain = task.model  # Accelerate's unwrap_model would import DeepSpeed where it is installed
        self.gradients = Gradients(self.model, accelerator)
        self.frozen_checksum = frozen_checksum(self.inner)
        self.average = None
        if config.ema_decay is not None and accelerator.is_main_process:
            self.average = ParameterAverage(trained_tensors(self.inner), config.ema_decay)

    def full_state(self, *, has_optimizer: bool = True) -> FullState:
        """The tensors themselves, not copies."""
        averages = None if self.average is None else self.average.averages
        optimizer = optimizer_tensors(self._adamw, trainable_parameters(self.inner))
        return FullState(trained_tensors(self.inner), optimizer if has_optimizer else {}, averages)

    def load(self, checkpoint: Path) -> LoopState:
        """In place."""
        return read_state(checkpoint, self.inner, self._adamw, self.average)

    def to_hold(self, full: FullState) -> dict[str, Tensor]:
        """Averages only: the module has the rest."""
        return full.average or {}

    def holding(self, tensors: dict[str, Tensor]) -> AbstractContextManager[None]:
        """Afterwards the module has its own tensors again, bit for bit."""
        targets = trained_tensors(self.plain)
        return replaced({name: targets[name] for name in tensors}, tensors)

    def describe(self) -> str:
        """Nothing."""
        return ""


def wrap_layers(task: Task, model: nn.Module, config: TrainingConfig, closing: ExitStack) -> None:
    """Compile the repeated layers, and compute their activations anew, as the settings say, until `closing`.

    Args:
        task: Says which layers.
        model: The task's model, or a copy of it.
        config: The settings.
        closing: Takes both off again, also when something later is refused.

    Raises:
        UsageError: when the layers do not allow it.
    """
    if config.torch_compile:
        closing.callback(LayerCompilation(task, model).undo)
    if config.activation_checkpointing:
        closing.callback(ActivationCheckpointing(task, model).undo)


def _give_back_later(model: nn.Module, closing: ExitStack) -> None:
    """Accelerate puts an autocasting `forward` over the model's, and marks it as prepared: then a second run would go
    without."""
    own, marks = OwnForwards([model]), {"_original_forward", "_is_accelerate_prepared"} - vars(model).keys()

    def give_back() -> None:
        own.give_back()
        for mark in marks:
            vars(model).pop(mark, None)

    closing.callback(give_back)
