"""Which models of a pipeline a swap is about."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn

from mmattn.errors import UsageError

MODEL = "model"
MOTION = "motion_modules"  # the temporal layers of AnimateDiff's U-Net: a part of their own


def parts_of(target: Any, chosen: Collection[str] | None) -> dict[str, nn.Module]:
    """The models to look into, by part name.

    A pipeline's parts are its components: by default the diffusers models among them (U-Net or transformer,
    ControlNets, VAE), others, such as text encoders, where `chosen` names them. A model by itself is one part.

    Raises:
        UsageError: for something that is neither, or for parts that do not exist.
    """
    if isinstance(target, nn.Module):
        target = uncompiled(target)
        if chosen is not None and set(chosen) - {MODEL, MOTION}:
            raise UsageError(f"swap_attention: parts={sorted(chosen)}, but a model by itself has no parts")
        return {MODEL: target}
    components = getattr(target, "components", None)
    if not isinstance(components, dict):
        raise UsageError(
            f"swap_attention: {type(target).__name__} is neither a diffusers pipeline nor a diffusers or transformers "
            "model"
        )
    models = {name: uncompiled(part) for name, part in components.items() if isinstance(part, nn.Module)}
    if chosen is None:
        # A motion adapter is where the U-Net's temporal layers were copied from; nothing runs it.
        return {name: model for name, model in models.items() if is_diffusers(model) and name != "motion_adapter"}
    missing = sorted(set(chosen) - set(models) - {MOTION})
    if missing:
        raise UsageError(
            f"swap_attention: no part {', '.join(missing)} in {type(target).__name__}; it has "
            f"{', '.join(sorted(models))} (and {MOTION}, the temporal layers of AnimateDiff)"
        )
    wanted = {name: model for name, model in models.items() if name in chosen}
    if MOTION in chosen and "unet" in models:
        wanted["unet"] = models["unet"]
    return wanted


def uncompiled(model: nn.Module) -> nn.Module:
    """The model inside what `torch.compile(model)` or peft's `get_peft_model` returns."""
    inner = getattr(model, "_orig_mod", None)
    model = inner if isinstance(inner, nn.Module) else model
    if is_diffusers(model) or is_transformers(model) or not hasattr(model, "get_base_model"):
        return model
    base: Any = model
    return base.get_base_model()


def is_diffusers(model: nn.Module) -> bool:
    """Whether a model, or a list of ControlNets, comes from diffusers."""
    return any(cls.__module__.split(".")[0] == "diffusers" for cls in type(model).__mro__)


def is_transformers(model: nn.Module) -> bool:
    """Whether a model comes from transformers."""
    return any(cls.__module__.split(".")[0] == "transformers" for cls in type(model).__mro__)
