"""What recipes do to a model around training: which part is trained, where the result lies, LoRA in PEFT's format."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from mmattn.errors import CheckpointError, ConfigError
from mmattn.models.checkpoints import WeightTable
from mmattn.training.publish import PUBLISHED, is_outdated
from mmattn.training.selection import LoRAConfig, adapter_state, add_lora, lora_config, train_only

_log = logging.getLogger(__name__)
_MODEL_FILES = ("config.json", "model_index.json")  # of one model, of a diffusion pipeline
TRAIN_WHAT = ("all", "lora", "cross_attention")


@dataclass(kw_only=True)
class TrainChoice:
    """Which weights a recipe trains.

    Args:
        train_what: "all" (every weight), "cross_attention" (only the layers that look at the picture, or at the source
            sentence) or "lora" (small adapters beside frozen weights; section `lora`).
    """

    train_what: str = "all"

    def __post_init__(self) -> None:
        if self.train_what not in TRAIN_WHAT:
            raise ConfigError(f"train_what is {self.train_what!r}: choose one of {', '.join(TRAIN_WHAT)}")


def trained_model(folder: Path) -> Path:
    """The model in a training run's folder: `best/`, else `final/`; a model's own folder is returned as it is.

    Raises:
        CheckpointError: none of them is there, or the run's checkpoints are sharded and hold more.
    """
    for candidate in (folder, *_parts(folder)):
        if any((candidate / name).is_file() for name in _MODEL_FILES):
            return candidate
    trained = next((path for part in (folder, *_parts(folder)) for path in part.glob("pytorch_*.safetensors")), None)
    if trained is not None:
        raise CheckpointError(
            f"{folder}: holds no model of its own, but {trained.name}, to be put into the model that it was trained "
            "on: name that model, and this folder by --lora or --kv"
        )
    raise CheckpointError(
        f"{folder}: no model here: neither {' nor '.join(_MODEL_FILES)} nor best/ nor final/; did training finish?"
    )


def _parts(folder: Path) -> list[Path]:
    found = [part for name in PUBLISHED if (part := folder / name).is_dir()]
    if is_outdated(folder):
        old = f", and {' and '.join(f'{part.name}/' for part in found)} of an earlier part of the run" if found else ""
        raise CheckpointError(
            f"{folder}: its checkpoints are sharded{old}: make a model of them by mmattn export {folder} NEW"
        )
    return found


def run_part(folder: Path) -> Path:
    """The result in a training run's folder: `best/`, else `final/`; any other folder is returned as it is.

    Raises:
        CheckpointError: the run's checkpoints are sharded and hold more.
    """
    return next(iter(_parts(folder)), folder)


def model_source(name: str) -> str | Path:
    """What `from_pretrained` opens for a name given by hand: a run's or a model's own folder, else a hub id."""
    folder = Path(name)
    return trained_model(folder) if folder.is_dir() else name


def check_form(given: Any, opened: Any, source: str, path: str = "model.network") -> None:
    """See that no setting of a new model's form contradicts the checkpoint that is opened instead.

    Args:
        given: the form in the config, a dataclass whose fields have defaults.
        opened: the checkpoint's, of the same class.
        source: the checkpoint's name, for the message.
        path: of the form in the config, for the message.

    Raises:
        ConfigError: a setting that is neither the default nor what the checkpoint has.
    """
    plain = type(given)()
    for name, value in vars(given).items():
        if is_dataclass(value):
            check_form(value, getattr(opened, name), source, f"{path}.{name}")
        elif value not in (getattr(plain, name), getattr(opened, name)):
            raise ConfigError(
                f"{path}.{name} is {value!r}, but {source} has {getattr(opened, name)!r}: it is for a new model, and "
                "model.from_pretrained opens one: leave it out"
            )


def warn_of_unused(config: Any, names: Collection[str], path: str = "model") -> None:
    """Say which settings of something new are given beside a checkpoint, which has it already.

    Args:
        config: the section, a dataclass whose fields have defaults.
        names: of those settings.
        path: of the section.
    """
    plain = type(config)()
    given = [f"{path}.{name}" for name in names if getattr(config, name) != getattr(plain, name)]
    if given:
        _log.warning("%s: not used, %s is opened as it is", ", ".join(given), config.from_pretrained)


def require_source(config: Any, names: Collection[str], path: str = "model") -> None:
    """See that nothing is said of a checkpoint where none is opened.

    Args:
        config: the section with `from_pretrained`.
        names: of settings that say something of that.
        path: of the section.

    Raises:
        ConfigError: one is set without it.
    """
    given = [f"{path}.{name}" for name in names if getattr(config, name) is not None]
    if given and config.from_pretrained is None:
        raise ConfigError(f"{', '.join(given)}: of {path}.from_pretrained, which is not set")


def choose_trained(
    network: nn.Module,
    what: str,
    lora: LoRAConfig,
    *,
    cross_attention: Collection[str],
    stock_names: Mapping[str, str],
    refusal: str,
) -> None:
    """Freeze what is not to be trained.

    Args:
        network: the network, changed in place.
        what: one of `TRAIN_WHAT`.
        lora: used for "lora".
        cross_attention: names of the parameters that "cross_attention" trains.
        stock_names: the modules that can hold an adapter, and their names in the checkpoint's own format.
        refusal: said of a module that cannot, after its name.

    Raises:
        ConfigError: nothing is left to train, or an adapter on a module that cannot hold one.
    """
    if what == "lora":
        add_lora(network, lora)
        adapted = {name.partition(".lora_")[0] for name in adapter_state(network)}
        others = sorted(adapted - set(stock_names))
        if others:
            raise ConfigError(f"lora.targets: {others[0]} {refusal}")
    elif what == "cross_attention":
        train_only(network, cross_attention)


def stock_module_names(table: WeightTable) -> dict[str, str]:
    """Our module names to those of the checkpoint's own format, for modules that are one and the same in both."""
    pairs = [(row.ours[0], row.stock) for row in table.weights if len(row.ours) == 1]
    return {
        ours.removesuffix(".weight"): stock.removesuffix(".weight") for ours, stock in pairs if ours.endswith(".weight")
    }


def save_adapter(network: nn.Module, folder: Path, stock_names: Mapping[str, str]) -> None:
    """Write the LoRA adapters of a network as a PEFT folder, under the stock class's module names.

    Args:
        network: with adapters from `add_lora`.
        folder: made when it is not there.
        stock_names: as in `choose_trained`.
    """
    tensors: dict[str, Tensor] = {}
    for name, tensor in adapter_state(network).items():
        module, dot, rest = name.partition(".lora_")
        tensors[f"base_model.model.{stock_names[module]}{dot}{rest}"] = tensor.contiguous()
    targets = sorted({name.removeprefix("base_model.model.").partition(".lora_")[0] for name in tensors})
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    values = {**lora_config(network).to_dict(), "target_modules": targets, "peft_type": "LORA", "inference_mode": True}
    (folder / "adapter_config.json").write_text(json.dumps(values, indent=2, default=sorted) + "\n", encoding="utf-8")
