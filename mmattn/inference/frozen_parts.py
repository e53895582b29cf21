"""Where the frozen parts of a model run before the training has started."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from mmattn.inference import folders
from mmattn.training import TrainingConfig


def encoding_device(config: TrainingConfig) -> torch.device:
    """This process's accelerator, if there is one and the run may use it, else the CPU."""
    device = torch.device("cpu") if config.device == "cpu" else folders.default_device()
    return device if device.type == "cpu" else torch.device(device.type, int(os.environ.get("LOCAL_RANK", "0")))


@contextlib.contextmanager
def placed(modules: Sequence[Any], device: torch.device | str) -> Iterator[None]:
    """Inside, modules are on a device; afterwards where they were, so that they take no memory from the training."""
    before = [next(module.parameters()).device for module in modules]
    try:
        for module in modules:
            module.to(device)
        yield
    finally:
        for module, place in zip(modules, before, strict=True):
            module.to(place)
