"""Which of our models a folder or hub id holds."""

from __future__ import annotations

from typing import Literal

Kind = Literal["translator", "vlm", "diffusion"]


def kind_of_model(model: str) -> Kind:
    """What the model argument names: a training run's folder, a model's own folder, or a hub id whose files are asked
    for.

    Raises:
        UsageError: it is not there, or holds no model.
    """
    from mmattn.cli.stock_models import PIPELINE, model_facts
    from mmattn.inference.trained import model_source

    facts, file = model_facts(str(model_source(model)))
    if file == PIPELINE:
        return "diffusion"
    is_vlm = "vision_config" in facts or "image" in facts
    return "vlm" if is_vlm else "translator"
