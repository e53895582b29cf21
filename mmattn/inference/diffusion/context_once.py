"""Keys and values of the text projected once per generation inside stock pipelines."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mmattn.models.unet import UNet, UNetContext

_HELD = 4  # contexts; a pipeline passes one text, callbacks may change it


@contextlib.contextmanager
def context_projected_once(unet: nn.Module) -> Iterator[None]:
    """Within it, a U-Net of ours that is given the same text tensor again uses the keys and values that it has made.

    Diffusers' pipelines pass one tensor at every step. It is known by identity and version and held, so that another
    tensor at its address is not mistaken for it. Training and gradients are left alone, and so are other U-Nets.

    Args:
        unet: `mmattn.UNet`; any other module is left as it is.
    """
    if not isinstance(unet, UNet):
        yield
        return
    held: dict[int, tuple[Tensor, int, UNetContext]] = {}

    def replace(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        text = kwargs.get("encoder_hidden_states")
        if not isinstance(text, Tensor) or kwargs.get("encoder_attention_mask") is not None:
            return None
        if module.training or torch.is_grad_enabled() or text.is_inference():  # the last have no version
            return None
        found = held.get(id(text))
        if found is None or found[0] is not text or found[1] != text._version:
            if len(held) >= _HELD:
                held.clear()
            # Filled by the first forward, under the LoRA scale that it is given.
            found = held[id(text)] = (text, text._version, UNetContext(text))
        return args, kwargs | {"encoder_hidden_states": found[2]}

    hook = unet.register_forward_pre_hook(replace, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()
