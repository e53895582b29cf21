"""Optional packages, probed once, with the install hint in the error."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
from types import ModuleType

from mmattn.errors import OptionalPackageError

_EXTRA_OF = {
    "peft": "recipes",
    "sacrebleu": "recipes",
    "sentencepiece": "recipes",
    "sacremoses": "recipes",
    "polib": "recipes",
    "matplotlib": "plot",
    "tensorboard": "all",
    "triton": "triton",
    "torchmetrics": "metrics",
    "torch-fidelity": "metrics",
    "gradio": "ui",
    "deepspeed": "deepspeed",
}


@functools.cache
def package_version(name: str) -> str | None:
    """Version of an installed distribution, or None when it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def require(name: str, purpose: str) -> ModuleType:
    """Import an optional package, or raise `OptionalPackageError` with the command that installs it.

    Args:
        name: of the distribution; its module has the same, with `_` for `-`.
        purpose: what needs it.
    """
    try:
        return importlib.import_module(name.replace("-", "_"))
    except ImportError as error:
        extra = _EXTRA_OF.get(name)
        command = f"pip install 'mmattn[{extra}]'" if extra else f"pip install {name}"
        raise OptionalPackageError(f"{purpose} needs the package {name}, which is not installed: {command}") from error
