"""AdamW over the trainable parameters, and the learning rate as a function of the optimiser step."""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mmattn.errors import UsageError
from mmattn.training.config import TrainingConfig
from mmattn.training.tensor_rows import own_rows

_UNDECAYED_MODULES = (
    nn.Embedding,
    nn.EmbeddingBag,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    nn.modules.batchnorm._NormBase,
)


class StepOptimizer(Protocol):
    """What a step needs of an optimiser: torch's, Accelerate's or another one's."""

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Settings by group."""
        ...

    def zero_grad(self) -> None:
        """Forget the gradients."""
        ...

    def step(self) -> None:
        """Change the parameters by their gradients."""
        ...


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name; tied ones once.

    Raises:
        UsageError: when nothing is.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trained:
        raise UsageError(f"nothing to train: no parameter of {type(model).__name__} has requires_grad")
    return trained


def undecayed_names(model: nn.Module) -> set[str]:
    """Trainable parameters without weight decay: biases, norms, gates (below two dimensions), embeddings, positions."""
    # A word embedding that is tied to the vocabulary head is an embedding, whichever of the two comes last.
    undecayed = [module for module in model.modules() if isinstance(module, _UNDECAYED_MODULES)]
    owned = {id(own) for module in undecayed for own in module.parameters(recurse=False)}
    return {
        name
        for name, parameter in trainable_parameters(model).items()
        if parameter.ndim < 2
        or id(parameter) in owned
        or any("position" in word or "embedding" in word for word in name.split("."))
    }


def make_optimizer(model: nn.Module, config: TrainingConfig, device: torch.device) -> torch.optim.AdamW:
    """AdamW (arXiv 1711.05101), one fused call where torch has it, with decay on weight matrices only."""
    undecayed = undecayed_names(model)
    groups: dict[float, list[Tensor]] = {config.weight_decay: [], 0.0: []}
    for name, parameter in trainable_parameters(model).items():
        groups[0.0 if name in undecayed else config.weight_decay].append(parameter)
    return torch.optim.AdamW(
        [{"params": members, "weight_decay": decay} for decay, members in groups.items() if members],
        lr=config.learning_rate,
        betas=(config.betas[0], config.betas[1]),
        eps=config.eps,
        fused=device.type in ("cuda", "cpu"),
    )


def learning_rate(config: TrainingConfig, step: int) -> float:
    """The learning rate of optimiser step `step`, counted from 0: linear warm-up, then cosine or constant."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    progress = min(1.0, (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps))
    floor = config.min_learning_rate_ratio
    return config.learning_rate * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


def set_learning_rate(optimizer: StepOptimizer, value: float) -> None:
    """Set the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = value


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """AdamW's state as named tensors, `exp_avg.<parameter>` and so on."""
    return {
        f"{kind}.{name}": value
        for name, parameter in names.items()
        for kind, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, names: dict[str, nn.Parameter], tensors: dict[str, Tensor]
) -> None:
    """Put back what `optimizer_tensors` gave, of sharded parameters the rows that this process holds, moments in the
    parameters' dtypes, as AdamW wants them; the learning rates are set anew by each step."""
    for name, parameter in names.items():
        state = {kind: tensors.get(f"{kind}.{name}") for kind in ("step", "exp_avg", "exp_avg_sq")}
        if any(value is None for value in state.values()):
            continue
        # A fused optimiser keeps its step counter beside the parameter; clones are aligned, as fresh tensors are.
        optimizer.state[parameter] = {
            kind: _like(parameter, value) if kind != "step" else value.to(parameter.device, copy=True)
            for kind, value in state.items()
            if value is not None
        }


@torch.no_grad()
def _like(parameter: nn.Parameter, value: Tensor) -> Tensor:
    moment = torch.zeros_like(parameter)
    own_rows(moment).local.copy_(value)
    return moment
