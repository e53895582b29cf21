"""Can mmattn's own Triton kernels run on a device of this machine?"""

from __future__ import annotations

import functools
from typing import Any

import torch
from packaging.version import Version

from mmattn._optional import package_version
from mmattn.ops.limits import torch_device_missing

_MIN_TRITON = "3.6"
_SHARED_BYTES = 163 * 1024
# Capabilities 10 and 11 have tensor memory, for which Triton compiles in another way: up to 3.7 it fails for kernels of
# packed rows and (3.6) gradients beyond 128 keys, and up to 3.8 gradients at heads of 160 want 272 KiB of shared
# memory. (Compiled without such a card; none of it has run on one.)
TENSOR_MEMORY = (10, 11)
_MIN_TRITON_TENSOR_MEMORY = "3.9"


@torch.compiler.assume_constant_result
def triton_missing(device: str) -> str | None:
    """Why they cannot be used on a device type here; None when they can."""
    return _probe(device)


@functools.cache
def _probe(device: str) -> str | None:
    version = package_version("triton")
    if version is None:
        return "needs the package triton: pip install 'mmattn[triton]'"
    if Version(version) < Version(_MIN_TRITON):
        return f"needs triton {_MIN_TRITON} or newer, {version} is installed"
    if device == "cpu":
        from mmattn.kernels.launch import is_interpreted

        return None if is_interpreted() else "needs a GPU (on a CPU only Triton's interpreter runs it, for tests)"
    missing = torch_device_missing(device)
    if missing is not None:
        return missing
    if torch.version.hip:
        return "written for NVIDIA GPUs, not tried on AMD"
    return _card_missing(torch.cuda.get_device_properties(torch.cuda.current_device()), version)


def _card_missing(card: Any, version: str) -> str | None:
    """Why they cannot be used on a card of these properties, compiled by that version of Triton."""
    if card.shared_memory_per_block_optin < _SHARED_BYTES:
        own = f"{card.name} has {card.shared_memory_per_block_optin // 1024} KiB"
        return f"needs {_SHARED_BYTES // 1024} KiB of shared memory a block (as an A100 or H100 has), {own}"
    if card.major in TENSOR_MEMORY and Version(version) < Version(_MIN_TRITON_TENSOR_MEMORY):
        return (
            f"needs triton {_MIN_TRITON_TENSOR_MEMORY} or newer on {card.name} (compute capability "
            f"{card.major}.{card.minor}), {version} is installed"
        )
    return None
