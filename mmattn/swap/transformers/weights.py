"""Whether attention weights are asked for: by argument, by the config, or by transformers' recording of outputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

try:  # a private name, and not in every version
    from transformers.utils.output_capturing import _active_collector
except ImportError:
    _active_collector = None


def are_weights_wanted(module: nn.Module, implementation: str | None, keywords: dict[str, Any]) -> bool:
    """Whether a module's caller looks at its attention weights.

    Models record what they return of `output_attentions=True` by hooks, and many do not pass the argument down to
    their attention; so the recording itself is asked as well.
    """
    asked = keywords.get("output_attentions")
    if asked is None and implementation == "eager":  # transformers refuses the setting with any other
        asked = getattr(module.config, "output_attentions", False)
    return bool(asked) or are_weights_recorded()


def are_weights_recorded() -> bool:
    """Whether a model that is running now records attention weights. torch.compile cannot read it in every place;
    compiled models do not record."""
    if _active_collector is None or torch.compiler.is_compiling():
        return False
    collected = _active_collector.get()
    return collected is not None and any("attentions" in key for key in collected)
