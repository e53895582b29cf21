"""An input of several products, cast for all of them at once."""

from __future__ import annotations

import torch
from torch import Tensor, nn

# Gradients are then rounded otherwise than by torch's own casts: results on a CPU stay as they are.
_CASTS_ONCE = ("cuda",)


def shared_input(x: Tensor, *linears: nn.Module | None) -> Tensor:
    """What several Linears read: under autocast on a card x in its dtype, else x.

    Each of them would cast x for itself: as many copies are made, and kept for the backward pass, which casts as many
    gradients back and adds them in float32. The outputs are the same bits; gradients are added in autocast's dtype, to
    which those of the products are rounded anyway.

    Args:
        x: their input.
        *linears: all of them. Anything else than plain Linears, such as an adapter, or a hook on one of them, may want
            x as it is, and gets it.
    """
    device = x.device.type
    if device not in _CASTS_ONCE or x.dtype is not torch.float32 or not torch.is_autocast_enabled(device):
        return x
    return x.to(torch.get_autocast_dtype(device)) if all(map(_is_plain, linears)) else x


def _is_plain(module: nn.Module | None) -> bool:
    return type(module) is nn.Linear and not module._forward_pre_hooks and not module._forward_hooks
