"""What `mmattn doctor` finds out about this machine."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterator

from mmattn import __version__

_PACKAGES = ("torch", "triton", "transformers", "tokenizers", "diffusers", "accelerate", "datasets", "safetensors")
_PACKAGES += ("numpy", "pillow", "peft", "sentencepiece", "sacrebleu", "sacremoses", "matplotlib", "tensorboard")


def versions() -> Iterator[tuple[str, str]]:
    """Name and version (or what is wrong with it) of Python and of each package that matters here."""
    yield "python", platform.python_version()
    yield "mmattn", __version__
    needed = _needed()
    for name in _PACKAGES:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield name, "not installed (optional)" if name not in needed else "NOT INSTALLED, and needed"
            continue
        too_old = name in needed and not needed[name].contains(version, prereleases=True)
        yield name, f"{version}  TOO OLD, needs {needed[name]}" if too_old else version


def devices() -> list[str]:
    """One line a device that torch can use."""
    import torch

    lines = [f"cpu: {platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"]
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        gigabytes = device.total_memory / 2**30
        lines.append(f"cuda:{index}: {device.name}, sm_{device.major}{device.minor}, {gigabytes:.0f} GiB")
    if torch.backends.mps.is_available():
        lines.append("mps: Apple GPU")
    return lines


def known_problems() -> list[str]:
    """What is wrong with this combination of versions; the backends table tells what concerns a single backend."""
    import torch

    if not torch.cuda.is_available():
        return []
    return cudnn_problems(torch.backends.cudnn.version())


def cudnn_problems(version: int | None) -> list[str]:
    """Problems of a cuDNN version as torch gives it (91900 is 9.19.0)."""
    if version is None or version >= 91500:
        return []
    return [
        f"cuDNN {version // 10000}.{version // 100 % 100} is loaded, older than the one that torch brings: a system "
        "CUDA on LD_LIBRARY_PATH probably hides it, and attention is slower; take it off that path"
    ]


def _needed() -> dict:
    """Version specifiers of mmattn's own requirements by distribution name; extras left out."""
    from packaging.requirements import Requirement

    try:
        lines = importlib.metadata.requires("mmattn") or []
    except importlib.metadata.PackageNotFoundError:  # run from a source tree that is not installed
        return {}
    requirements = [Requirement(line) for line in lines if "extra ==" not in line]
    return {requirement.name: requirement.specifier for requirement in requirements}
