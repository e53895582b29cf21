"""What is trained: everything, some parameters by name, or LoRA adapters beside frozen weights."""

from __future__ import annotations

import copy
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor, nn

from mmattn._optional import require
from mmattn.errors import ConfigError

ModuleT = TypeVar("ModuleT", bound=nn.Module)


@dataclass
class LoRAConfig:
    """Low-rank adapters (arXiv 2106.09685), put in by peft; for `train_what: lora`.

    Args:
        rank: Inner width of an adapter: more learns more, and is larger.
        alpha: An adapter's output is multiplied by `alpha / rank`.
        dropout_p: Dropout on an adapter's input, in training only.
        targets: Which Linears get one: ends of their names ("q_proj"), or a single regular expression over whole names.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout_p: float = 0.0
    targets: list[str] = field(default_factory=lambda: ["q_proj", "k_proj", "v_proj", "out_proj"])


@dataclass(frozen=True)
class Selection:
    """How much of a module is trained.

    Attributes:
        num_trained: parameters that the optimiser changes.
        num_parameters: all of them.
    """

    num_trained: int
    num_parameters: int

    def __str__(self) -> str:
        share = self.num_trained / self.num_parameters
        return f"{self.num_trained:,} of {self.num_parameters:,} parameters ({share:.1%})"


def train_only(module: nn.Module, names: Collection[str]) -> None:
    """Freeze every parameter that is not among `names`.

    Raises:
        ConfigError: none of the names is a parameter of the module.
    """
    chosen = set(names)
    if not chosen & {name for name, _ in module.named_parameters()}:
        raise ConfigError(f"nothing to train: {type(module).__name__} has none of the parameters that were asked for")
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in chosen)


def add_lora(module: nn.Module, config: LoRAConfig) -> nn.Module:
    """Put LoRA adapters into a module, in place, and freeze the rest.

    Raises:
        ConfigError: no module's name ends in one of the targets, or a rank below 1.
        OptionalPackageError: peft is not installed.
    """
    peft = require("peft", "training with LoRA")
    if config.rank < 1:
        raise ConfigError(f"lora.rank must be at least 1, not {config.rank}")
    try:
        lora = peft.LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,
            lora_dropout=config.dropout_p,
            target_modules=config.targets[0] if _is_pattern(config.targets) else list(config.targets),
        )
        peft.inject_adapter_in_model(lora, module)
    except ValueError as error:
        linears = sorted({name.rpartition(".")[2] for name, part in module.named_modules() if _is_linear(part)})
        raise ConfigError(
            f"lora.targets {config.targets} fit no module of this model; its Linears are called {', '.join(linears)}"
        ) from error
    module.lora_config = lora  # pyright: ignore[reportAttributeAccessIssue]
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(".lora_" in name)
    return module


def _is_pattern(targets: list[str]) -> bool:
    """Whether peft shall take the only target for a regular expression: it is no plain module name."""
    return len(targets) == 1 and not targets[0].replace(".", "_").isidentifier()


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)


def selection(module: nn.Module) -> Selection:
    """Count what would be trained now."""
    sizes = [(p.numel(), p.requires_grad) for p in module.parameters()]
    return Selection(sum(size for size, is_trained in sizes if is_trained), sum(size for size, _ in sizes))


def lora_config(module: nn.Module) -> Any:
    """peft's config of the adapters that `add_lora` put in, or None."""
    return getattr(module, "lora_config", None)


def merged_copy(module: ModuleT) -> ModuleT:
    """A copy of a module in which its LoRA adapters are added to the weights, and gone as modules."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    copied = copy.deepcopy(module)
    for name, part in list(copied.named_modules()):
        if isinstance(part, BaseTunerLayer):
            part.merge(safe_merge=True)
            parent, _, child = name.rpartition(".")
            setattr(copied.get_submodule(parent), child, part.get_base_layer())
    return copied


def adapter_state(module: nn.Module) -> dict[str, Tensor]:
    """The LoRA tensors of a module by the names that PEFT saves, without its `base_model.model.` prefix."""
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(module)  # pyright: ignore[reportArgumentType]
    return {name.removeprefix("base_model.model."): tensor.detach().cpu() for name, tensor in state.items()}
