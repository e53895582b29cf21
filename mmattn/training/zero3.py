"""DeepSpeed's ZeRO-3 (arXiv 1910.02054): every process holds a piece of each parameter, gradient and moment.

DeepSpeed cuts, gathers and sums; what a step is, when it is taken and what is written stays with the loop. It is set up
here and not by Accelerate, which would step in every backward pass, and would not use it on a CPU.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from mmattn.errors import CheckpointError, UsageError
from mmattn.training.config import TrainingConfig
from mmattn.training.deepspeed_package import open_deepspeed
from mmattn.training.ema import ParameterAverage
from mmattn.training.opened_outputs import OpenedOutputs
from mmattn.training.optim import make_optimizer, trainable_parameters
from mmattn.training.spread import SpreadModel
from mmattn.training.state import (
    AVERAGE,
    OPTIMIZER,
    TRAINED,
    FullState,
    LoopState,
    read_loop_state,
    require_same_shapes,
    stored_buffers,
)
from mmattn.training.task import Task
from mmattn.training.tensor_rows import TensorFiles
from mmattn.training.zero3_leftovers import Leftovers
from mmattn.training.zero3_pieces import Moments, Piece, own_piece, read_piece, require_cut, whole_tensor
from mmattn.training.zero3_steps import PartitionedGradients, PartitionedOptimizer

# Smaller parameters (norms, biases) stay gathered between their uses: DeepSpeed's own bound.
KEPT_GATHERED = 100_000
BUCKET = 50_000_000  # elements that are summed, or gathered ahead, in one call
MAX_GATHERED = 100_000_000  # elements at most, of larger parameters


class PartitionedModel(SpreadModel):
    """A copy of the task's model, cut by DeepSpeed, is trained.

    Args:
        task: Of the run.
        config: The settings.
        accelerator: Without DeepSpeed.
        closing: DeepSpeed's hooks are taken off as this closes, and what it would keep in memory is given back.

    Raises:
        UsageError: when a parameter is not float32 or has no dimension, or is whole afterwards.
    """

    def __init__(self, task: Task, config: TrainingConfig, accelerator: Accelerator, closing: ExitStack) -> None:
        _require_plain_parameters(task.model)
        super().__init__(task, config, accelerator, closing)
        self.inner = self._to_cut
        outputs = OpenedOutputs(self.inner)
        closing.callback(outputs.undo)
        self.model = self._engine = _initialize(self.inner, config, accelerator)
        leftovers = Leftovers(self._engine)
        closing.callback(leftovers.give_back)
        closing.callback(self._engine.destroy)
        outputs.close_again(self._engine)
        trained = trainable_parameters(self.inner)
        self.gradients = gradients = PartitionedGradients(self._engine, trained, accelerator, leftovers)
        closing.callback(gradients.close)
        self.optimizer = PartitionedOptimizer(self._engine)
        self._moments = Moments(self._engine.optimizer)
        require_cut(self.inner, accelerator.num_processes)
        self.average = None
        if config.ema_decay is not None:
            held = {name: parameter.ds_tensor for name, parameter in self._parameters().items()}
            self.average = ParameterAverage(held | stored_buffers(self.inner), config.ema_decay)

    def _parameters(self) -> dict[str, Any]:
        return trainable_parameters(self.inner)

    def full_state(self, *, has_optimizer: bool = True) -> FullState:
        """Copies on the CPU."""
        parameters, buffers = self._parameters(), stored_buffers(self.inner)
        moments = {
            f"{kind}.{name}": value
            for name, parameter in (parameters.items() if has_optimizer else ())
            for kind, value in self._moments.of(parameter).items()
        }
        average = None if self.average is None else self._whole(self._averages(self.average))
        pieces = {name: own_piece(parameter) for name, parameter in parameters.items()}
        return FullState(self._whole({**pieces, **buffers}), self._whole(moments), average)

    def _averages(self, average: ParameterAverage) -> dict[str, Tensor | Piece]:
        parameters = self._parameters()
        return {
            name: own_piece(parameters[name], value) if name in parameters else value
            for name, value in average.averages.items()
        }

    def _whole(self, tensors: dict[str, Tensor | Piece]) -> dict[str, Tensor]:
        return self._on_main(
            (name, whole_tensor(value) if isinstance(value, Piece) else value) for name, value in tensors.items()
        )

    @torch.no_grad()
    def load(self, checkpoint: Path) -> LoopState:
        """Each process its own pieces.

        Raises:
            CheckpointError: also where the parameters have taken different numbers of steps.
        """
        state = read_loop_state(checkpoint)
        parameters, buffers = self._parameters(), stored_buffers(self.inner)
        with TensorFiles(checkpoint, TRAINED) as files:
            pieces = {name: own_piece(parameter) for name, parameter in parameters.items()}
            shapes = {name: tuple(value.shape) for name, value in (*pieces.items(), *buffers.items())}
            require_same_shapes(shapes, files.shapes, checkpoint)
            _read(files, {**pieces, **buffers})
        self._engine.optimizer.refresh_fp32_params()  # a second copy, which is what is stepped
        with TensorFiles(checkpoint, OPTIMIZER) as files:
            self._load_moments(files, parameters)
        if self.average is not None and TensorFiles.exist(checkpoint, AVERAGE):
            with TensorFiles(checkpoint, AVERAGE) as files:
                _read(files, self._averages(self.average))
            self.average.updates = state.average_updates
        elif self.average is not None:  # a run continued elsewhere that had none
            self.average.restart()
        return state

    def _load_moments(self, files: TensorFiles, parameters: dict[str, Any]) -> None:
        for group, names in self._moments.groups(parameters).items():
            steps = {name: files.read(f"step.{name}") for name in names if f"step.{name}" in files.shapes}
            if not steps:
                continue
            one, *others = sorted(names, key=lambda name: name not in steps)
            for other in others:
                if other not in steps or steps[other] != steps[one]:
                    raise CheckpointError(
                        f"{files.folder}: {one} has taken {int(steps[one])} steps and {other} "
                        f"{int(steps.get(other, 0))}, and DeepSpeed counts them together: go on with "
                        "training.sharding=fsdp2, or none"
                    )
            self._moments.start(group, steps[one])
            for name in names:
                moments = self._moments.of(parameters[name])
                _read(files, {f"{kind}.{name}": value for kind, value in moments.items() if isinstance(value, Piece)})

    def describe(self) -> str:
        """In a few words."""
        return f"cut by DeepSpeed's ZeRO-3 over {self._accelerator.num_processes} processes"


def _read(files: TensorFiles, targets: dict[str, Tensor | Piece]) -> None:
    for name, target in targets.items():
        if isinstance(target, Piece):
            read_piece(files, name, target)
        else:
            target.copy_(files.read(name))


def _require_plain_parameters(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.dtype != torch.float32:
            raise UsageError(
                f"training.sharding=zero3 keeps all weights in float32, and {name} is {parameter.dtype}: convert it, "
                "or use sharding=fsdp2"
            )
        if parameter.ndim == 0:
            raise UsageError(
                f"training.sharding=zero3 cannot cut {name}, which has no dimension: give it the shape [1], or use "
                "sharding=none"
            )


def _initialize(model: nn.Module, config: TrainingConfig, accelerator: Accelerator) -> Any:
    deepspeed = open_deepspeed(accelerator.device.type)
    optimizer = make_optimizer(model, config, accelerator.device)  # now, while parameters have their shapes
    deepspeed.init_distributed(dist_init_required=False)
    # One parameter after the other goes to the device and is cut there: no device ever holds the whole model.
    deepspeed.zero.Init(module=model, config_dict_or_path=_settings(accelerator))
    model.to(accelerator.device)  # buffers; of parameters nothing is left to move
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=_settings(accelerator), dist_init_required=False
    )
    return cast(Any, engine)


def _settings(accelerator: Accelerator) -> dict[str, Any]:
    """DeepSpeed's, with all off that the loop does. Batch sizes mean nothing here, and it wants them."""
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "steps_per_print": None,
        "timers": {"throughput": {"enabled": False}},  # it would wait for the GPU twice in every micro-batch
        "zero_optimization": {
            "stage": 3,
            "memory_efficient_linear": False,  # it replaces torch.nn.functional.linear, for the life of the process
            "overlap_comm": accelerator.device.type != "cpu",
            "reduce_bucket_size": BUCKET,
            "stage3_prefetch_bucket_size": BUCKET,
            "stage3_max_live_parameters": MAX_GATHERED,
            "stage3_max_reuse_distance": MAX_GATHERED,
            "stage3_param_persistence_threshold": KEPT_GATHERED,
        },
    }
    if accelerator.mixed_precision == "bf16":
        # Without its own modules that travel in bf16: weights and gradients do so in float32, as with DDP.
        settings["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    return settings
