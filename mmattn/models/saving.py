"""What every family does when it opens and saves a network."""

from __future__ import annotations

import torch
from torch import nn

from mmattn.errors import CheckpointError, ConfigError


def weights_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """The dtype in which a checkpoint's weights are wanted: float32 for None, None for "auto" (as in the file).

    Raises:
        ConfigError: a name that is no dtype, or one of whole numbers.
    """
    if dtype is None:
        return torch.float32
    if dtype == "auto":
        return None
    found = dtype if isinstance(dtype, torch.dtype) else getattr(torch, str(dtype), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ConfigError(f"dtype {dtype!r} is unknown: use float32, float16, bfloat16 or auto")
    return found


def check_sizes(network: nn.Module, expected: nn.Module) -> None:
    """Raise unless a network's tensors have the sizes of one newly built from its config.

    Raises:
        CheckpointError: the first tensor that differs.
    """
    sizes = {name: tuple(tensor.shape) for name, tensor in expected.state_dict().items()}
    for name, tensor in network.state_dict().items():
        if name in sizes and sizes[name] != tuple(tensor.shape):
            raise CheckpointError(
                f"the network cannot be saved: {name} is {list(tensor.shape)}, its config says {list(sizes[name])}:"
                " change network.config together with the modules"
            )
