"""mmattn: cross-attention you can trust, swap, see and fine-tune.

Importing this package loads neither torch models nor optional packages: every public name below is
imported on first use. See the README for the three ways of using it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_EXPORTS = {
    "attention": "mmattn.ops.attention",
    "backends": "mmattn.ops.registry",
    "use_backend": "mmattn.ops.registry",
    "Translator": "mmattn.inference.translator",
    "VisionLanguageModel": "mmattn.inference.vlm",
    "TextToImage": "mmattn.inference.text_to_image",
    "UNet": "mmattn.models.unet",
    "record_attention": "mmattn.maps.record",
    "steer_attention": "mmattn.maps.steer",
    "swap_attention": "mmattn.swap.api",
    "MmattnError": "mmattn.errors",
}
_SUBMODULES = ("nn", "ops", "models", "data", "training", "swap", "maps", "inference", "config", "errors")

__all__ = ["__version__", *_EXPORTS, *_SUBMODULES]

if TYPE_CHECKING:
    from mmattn.errors import MmattnError as MmattnError
    from mmattn.inference.text_to_image import TextToImage as TextToImage
    from mmattn.inference.translator import Translator as Translator
    from mmattn.inference.vlm import VisionLanguageModel as VisionLanguageModel
    from mmattn.maps.record import record_attention as record_attention
    from mmattn.maps.steer import steer_attention as steer_attention
    from mmattn.models.unet import UNet as UNet
    from mmattn.ops.attention import attention as attention
    from mmattn.ops.registry import backends as backends
    from mmattn.ops.registry import use_backend as use_backend
    from mmattn.swap.api import swap_attention as swap_attention


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        value = getattr(importlib.import_module(_EXPORTS[name]), name)
        globals()[name] = value
        return value
    if name in _SUBMODULES:
        return importlib.import_module(f"mmattn.{name}")
    raise AttributeError(f"module 'mmattn' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
