"""Opens what `--model` names."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mmattn.inference.vlm import VisionLanguageModel


def open_vlm(model: str) -> VisionLanguageModel:
    """The vision-language model in a training run's folder, in a model's own folder, or on the hub."""
    from mmattn.inference.vlm import VisionLanguageModel
    from mmattn.inference.vlm_setup import trained_model

    folder = Path(model)
    return VisionLanguageModel.from_pretrained(trained_model(folder) if folder.is_dir() else model)
