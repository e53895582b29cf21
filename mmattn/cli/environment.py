"""What `mmattn doctor` finds out about this machine."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mmattn import __version__

_PACKAGES = ("torch", "triton", "transformers", "tokenizers", "diffusers", "accelerate", "datasets", "safetensors")
_PACKAGES += ("numpy", "pillow", "peft", "sentencepiece", "sacrebleu", "sacremoses", "matplotlib", "tensorboard")


@dataclass(frozen=True)
class Facts:
    """What decides whether a known fault can be met: versions as tuples, compute capabilities of the CUDA devices."""

    torch: tuple[int, int]
    cudnn: tuple[int, int] | None
    capabilities: tuple[tuple[int, int], ...]


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


def facts() -> Facts:
    """The facts about this machine."""
    import torch
    from packaging.version import Version

    release = Version(torch.__version__).release
    cudnn = torch.backends.cudnn.version() if torch.cuda.is_available() else None
    count = torch.cuda.device_count()
    return Facts(
        torch=(release[0], release[1]),
        cudnn=(cudnn // 10000, cudnn // 100 % 100) if cudnn else None,
        capabilities=tuple(torch.cuda.get_device_capability(index) for index in range(count)),
    )


def known_problems(found: Facts) -> Sequence[str]:
    """Combinations of versions and devices that are known to give wrong or slow results, with what to do."""
    problems = []
    if found.torch >= (2, 11) and (9, 0) in found.capabilities:
        problems.append(
            "cuDNN attention on sm_90: the backward with an attn_mask can give NaN (pytorch issue 196678); "
            "torch.backends.cuda.enable_cudnn_sdp(False) avoids it"
        )
    if any(capability[0] == 10 for capability in found.capabilities):
        problems.append(
            "cuDNN attention on sm_100: wrong results with fewer than 8 key/value heads (pytorch issue 193893); "
            "torch.backends.cuda.enable_cudnn_sdp(False) avoids it"
        )
    if found.torch >= (2, 11) and found.cudnn is not None and found.cudnn <= (9, 15):
        problems.append(
            f"cuDNN {found.cudnn[0]}.{found.cudnn[1]} is older than the one that comes with torch: a system CUDA on "
            "LD_LIBRARY_PATH probably hides it, and attention is slower; take it off the path"
        )
    return problems


def _needed() -> dict:
    """Version specifiers of mmattn's own requirements by distribution name; extras left out."""
    from packaging.requirements import Requirement

    try:
        lines = importlib.metadata.requires("mmattn") or []
    except importlib.metadata.PackageNotFoundError:  # run from a source tree that is not installed
        return {}
    requirements = [Requirement(line) for line in lines if "extra ==" not in line]
    return {requirement.name: requirement.specifier for requirement in requirements}
