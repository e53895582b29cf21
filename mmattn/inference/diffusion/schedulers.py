"""Diffusers' schedulers by name, with the settings of the one that a model came with."""

from __future__ import annotations

import inspect
import logging
from typing import Any, cast

import diffusers
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from mmattn.errors import UsageError

_log = logging.getLogger(__name__)

SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-ancestral": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "lcm": "LCMScheduler",
    "pndm": "PNDMScheduler",
    "unipc": "UniPCMultistepScheduler",
}
# They draw from a source of their own, which no seed of ours reaches.
_UNSEEDED = ("DPMSolverSDEScheduler", "CosineDPMSolverMultistepScheduler")
# What a schedule means, or keeps the picture in range; the rest are ways of stepping, each scheduler's own.
_CARRIED = (
    "prediction_type",
    "rescale_betas_zero_snr",
    "trained_betas",
    "beta_schedule",
    "thresholding",
    "clip_sample",
)


def make_scheduler(wanted: str | SchedulerMixin, current: Any) -> Any:
    """A scheduler for a model whose folder has another one.

    Args:
        wanted: a name of `SCHEDULERS`, the name of a class of diffusers, or a scheduler, which is taken as it is.
        current: the model's scheduler; its noise schedule and prediction type go over. A setting that the other kind
            does not have is warned of.

    Raises:
        UsageError: no such scheduler, or one that is for other models.
    """
    if isinstance(wanted, SchedulerMixin):
        return _suitable(wanted)
    cls: Any = getattr(diffusers, SCHEDULERS.get(wanted, wanted), None) if isinstance(wanted, str) else None
    if not (isinstance(cls, type) and issubclass(cls, SchedulerMixin)):
        raise UsageError(
            f"scheduler {wanted!r} is unknown: use {', '.join(SCHEDULERS)}, or the name of a scheduler of diffusers"
        )
    try:
        made = cast(Any, cls).from_config(current.config)
    except (TypeError, ValueError) as error:  # settings that it must have, or does not take
        reason = str(error).splitlines()[0]
        raise UsageError(f"{cls.__name__} cannot take the settings of the model's own scheduler ({reason})") from error
    _suitable(made)
    known = inspect.signature(cls.__init__).parameters
    lost = [name for name in _CARRIED if current.config.get(name) and name not in known]
    if lost:
        settings = ", ".join(f"{name}={current.config[name]}" for name in lost)
        _log.warning("%s has no %s, which the model's own scheduler sets: it is left out", cls.__name__, settings)
    return made


def _suitable(scheduler: Any) -> Any:
    """A scheduler that a text-to-image pipeline can step with.

    Raises:
        UsageError: it is for another kind of model.
    """
    lacks = [
        name for name in ("init_noise_sigma", "order", "scale_model_input", "step") if not hasattr(scheduler, name)
    ]
    parameters = [] if "step" in lacks else list(inspect.signature(scheduler.step).parameters.values())[3:]
    needs = [each.name for each in parameters if each.default is each.empty and each.kind is not each.VAR_KEYWORD]
    if lacks or needs:
        why = f"it has no {', '.join(lacks)}" if lacks else f"its steps need {', '.join(needs)}"
        raise UsageError(
            f"{type(scheduler).__name__} is for another kind of model ({why}): use {', '.join(SCHEDULERS)}"
        )
    return scheduler


def check_seeded(scheduler: Any) -> None:
    """Raise `UsageError` for a scheduler whose draws a seed does not decide."""
    name = type(scheduler).__name__
    if name in _UNSEEDED:
        raise UsageError(f"{name} draws noise that the seed does not decide: use dpm++ or euler-ancestral instead")
