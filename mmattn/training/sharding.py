"""FSDP2: every process holds some rows of each parameter, of its gradient and of the optimiser's state.

Layers are gathered while they run, one after the other (arXiv 1910.02054, ZeRO stage 3). On a GPU Accelerate wraps the
model, on a CPU torch's `fully_shard` does, since Accelerate would train with DDP there without a word.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from typing import cast

from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor

from mmattn.errors import UsageError
from mmattn.training.config import TrainingConfig
from mmattn.training.ema import ParameterAverage
from mmattn.training.gradients import Gradients
from mmattn.training.launcher_sharding import fsdp_plugin
from mmattn.training.optim import StepOptimizer, make_optimizer, optimizer_tensors, trainable_parameters
from mmattn.training.repeated_layers import repeated_layers
from mmattn.training.spread import SpreadModel
from mmattn.training.state import FullState, LoopState, read_state, trained_tensors
from mmattn.training.task import Task
from mmattn.training.tensor_rows import Rows, own_rows, whole


class ShardedModel(SpreadModel):
    """A copy of the task's model, sharded by rows, is trained.

    Args:
        task: Its `repeated_layers` are sharded one by one, what remains of the model together.
        config: The settings.
        accelerator: With FSDP2 on a GPU.
        closing: Of what is put around the layers.

    Raises:
        UsageError: when a parameter cannot be sharded, or is whole afterwards.
    """

    def __init__(self, task: Task, config: TrainingConfig, accelerator: Accelerator, closing: ExitStack) -> None:
        super().__init__(task, config, accelerator, closing)
        model = self._to_cut
        self._layers = layers_to_shard(task, model)
        _require_dimensions(model)
        prepare = _by_torch if accelerator.device.type == "cpu" else _by_accelerate
        model, optimizer = prepare(model, self._layers, config, accelerator)
        self.optimizer, self._adamw = cast(StepOptimizer, optimizer), optimizer.optimizer
        self.model = self.inner = model
        self.gradients = Gradients(self.model, accelerator)
        require_sharded(self.inner, accelerator.num_processes)
        self.average = None
        if config.ema_decay is not None:
            own = {name: own_rows(tensor).local for name, tensor in trained_tensors(self.inner).items()}
            self.average = ParameterAverage(own, config.ema_decay)

    def full_state(self, *, has_optimizer: bool = True) -> FullState:
        """Copies on the CPU."""
        trained = trained_tensors(self.inner)
        state = optimizer_tensors(self._adamw, trainable_parameters(self.inner)) if has_optimizer else {}
        average = None if self.average is None else self._whole(self.average.averages, trained)
        return FullState(self._whole(trained, trained), self._whole(state, state), average)

    def load(self, checkpoint: Path) -> LoopState:
        """Each process its own rows."""
        return read_state(checkpoint, self.inner, self._adamw, self.average)

    def own_state(self) -> dict[str, dict[str, Rows]]:
        """By the kind of a checkpoint's tensors, the rows that this process has to write."""
        trained = trained_tensors(self.inner)
        state = optimizer_tensors(self._adamw, trainable_parameters(self.inner))
        found = {"trained": self._own(trained), "optimizer": self._own(state)}
        if self.average is not None:
            places = {name: own_rows(trained[name]) for name in self.average.averages}
            averages = {
                name: Rows(value, places[name].first, places[name].shape)
                for name, value in self.average.averages.items()
                if self._is_written_here(trained[name])
            }
            found["average"] = averages
        return found

    def _own(self, tensors: dict[str, Tensor]) -> dict[str, Rows]:
        return {name: own_rows(tensor) for name, tensor in tensors.items() if self._is_written_here(tensor)}

    def _is_written_here(self, tensor: Tensor) -> bool:
        # Buffers and counters are whole in every process.
        return isinstance(tensor, DTensor) or self._accelerator.is_main_process

    def _whole(self, tensors: dict[str, Tensor], likes: dict[str, Tensor]) -> dict[str, Tensor]:
        return self._on_main((name, whole(tensor, likes[name])) for name, tensor in tensors.items())

    def describe(self) -> str:
        """In a few words."""
        return f"sharded by FSDP2 over {self._accelerator.num_processes} processes in {len(self._layers) + 1} parts"


def layers_to_shard(task: Task, model: nn.Module) -> dict[str, nn.Module]:
    """The modules that are sharded by themselves: those of the classes that the launcher names, or else the task's.

    Raises:
        UsageError: when the model has none of a class that the launcher names.
    """
    if os.environ.get("FSDP_AUTO_WRAP_POLICY", "").upper() == "NO_WRAP":
        return {}
    names = [name for name in os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP", "").split(",") if name]
    if not names:
        return repeated_layers(task, model)
    classes = {type(module).__name__ for module in model.modules()}
    unknown = sorted(set(names) - classes)
    if unknown:
        raise UsageError(
            f"fsdp_transformer_layer_cls_to_wrap names {', '.join(unknown)}, of which {type(task.model).__name__} has "
            f"none: leave it out, and {type(task).__name__} says what is sharded, or name some of "
            f"{', '.join(sorted(classes))}"
        )
    return {name: module for name, module in model.named_modules() if name and type(module).__name__ in names}


def _require_dimensions(model: nn.Module) -> None:
    scalars = [name for name, parameter in model.named_parameters() if parameter.ndim == 0]
    if scalars:
        raise UsageError(
            f"training.sharding=fsdp2 cuts parameters along their first dimension, and {', '.join(scalars[:5])} has "
            "none: give it the shape [1], or use sharding=none"
        )


def _by_torch(
    model: nn.Module, layers: dict[str, nn.Module], config: TrainingConfig, accelerator: Accelerator
) -> tuple[nn.Module, AcceleratedOptimizer]:
    mesh = init_device_mesh("cpu", (accelerator.num_processes,))
    for layer in reversed(list(layers.values())):  # inner ones first, where they are nested
        fully_shard(layer, mesh=mesh, reshard_after_forward=bool(fsdp_plugin().reshard_after_forward))
    fully_shard(model, mesh=mesh)
    return model, accelerator.prepare(make_optimizer(model, config, accelerator.device))


def _by_accelerate(
    model: nn.Module, layers: dict[str, nn.Module], config: TrainingConfig, accelerator: Accelerator
) -> tuple[nn.Module, AcceleratedOptimizer]:
    _tell_accelerate(accelerator, layers)
    return accelerator.prepare(model, make_optimizer(model, config, accelerator.device))


def _tell_accelerate(accelerator: Accelerator, layers: dict[str, nn.Module]) -> None:
    plugin = accelerator.state.fsdp_plugin
    assert plugin is not None
    plugin.auto_wrap_policy = transformer_auto_wrap_policy if layers else None
    plugin.transformer_cls_names_to_wrap = sorted({type(layer).__name__ for layer in layers.values()})
    # Weights and gradients travel in float32, as with DDP: autocasting alone decides what is computed in bf16.
    plugin.mixed_precision_policy = MixedPrecisionPolicy()


def require_sharded(model: nn.Module, num_processes: int) -> None:
    """Check that every parameter is spread over all processes.

    Raises:
        UsageError: when one is not.
    """
    for name, parameter in model.named_parameters():
        if not isinstance(parameter, DTensor) or parameter.device_mesh.size() != num_processes:
            spread = parameter.device_mesh.size() if isinstance(parameter, DTensor) else 1
            raise UsageError(
                f"sharding fsdp2 over {num_processes} processes was asked for, but {name} is spread over {spread}: "
                "this run would not be what was asked; look at the launcher's FSDP settings"
            )
