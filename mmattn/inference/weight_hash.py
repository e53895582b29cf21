"""A module's weights as a hash, for the names of caches: what frozen weights computed is good for them only."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def add_weights(digest: Any, module: nn.Module) -> None:
    """Feed a module's tensors (parameters and persistent buffers), their names, dtypes and shapes to a hash.

    Args:
        digest: of `hashlib`.
        module: on any device.
    """
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
