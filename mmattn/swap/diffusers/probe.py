"""Random inputs for one attention layer, made from the module itself, so that `verify` can run it by itself."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models import attention_dispatch
from diffusers.models.modeling_utils import get_parameter_device, get_parameter_dtype
from torch import Tensor, nn

from mmattn.swap.layers import head_count, head_dim

_BATCH, _SIDE, _TEXT = 2, 5, 7


def run_layer(attn: Any) -> Tensor:
    """Output of a legacy attention module, whatever its processor is, on fixed random inputs."""
    device, dtype = place_of(attn)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    is_picture = attn.group_norm is not None or attn.spatial_norm is not None
    is_added = attn.added_kv_proj_dim is not None
    shape = (attn.query_dim, _SIDE, _SIDE) if is_picture else (_SIDE * _SIDE, attn.query_dim)
    arguments: dict[str, Any] = {}
    if attn.spatial_norm is not None:
        arguments["temb"] = random(_BATCH, attn.spatial_norm.conv_y.in_channels, _SIDE, _SIDE)
    if is_added:
        arguments["encoder_hidden_states"] = random(_BATCH, _TEXT, attn.added_kv_proj_dim)
    elif attn.is_cross_attention:
        arguments["encoder_hidden_states"] = random(_BATCH, _TEXT, attn.cross_attention_dim)
    processor = attn.processor
    if hasattr(processor, "to_k_ip"):
        counts = [len(scale) if isinstance(scale, list) else 1 for scale in processor.scale]
        sizes = zip(counts, processor.num_tokens, processor.to_k_ip, strict=True)
        pictures = [random(_BATCH, count, tokens, to_k.in_features) for count, tokens, to_k in sizes]
        arguments["encoder_hidden_states"] = (arguments["encoder_hidden_states"], pictures)
        if any(isinstance(scale, list) for scale in processor.scale):  # a scale for each picture needs masks
            arguments["ip_adapter_masks"] = [random(1, count, _SIDE, _SIDE) for count in counts]
    output = attn(random(_BATCH, *shape), **arguments)
    if isinstance(output, tuple):
        return torch.cat([part.flatten() for part in output])
    return output


def run_backend(module: Any) -> Tensor:
    """What the backend of a dispatcher model's layer gives for fixed random queries, keys and values."""
    device, dtype = place_of(module)
    heads, size = head_count(module), head_dim(module)
    assert heads is not None
    assert size is not None
    generator = torch.Generator().manual_seed(0)
    shape = (_BATCH, _SIDE * _SIDE, heads, size)
    query, key, value = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(3))
    return attention_dispatch.dispatch_attention_fn(query, key, value, backend=module.processor._attention_backend)


def place_of(module: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where a module computes, and in which type: its weights may wait elsewhere, and be stored in a smaller type."""
    device, dtype = get_parameter_device(module), get_parameter_dtype(module)
    if device.type == "meta":  # accelerate brings them
        hooks = [getattr(part, "_hf_hook", None) for part in module.modules()]
        devices = [getattr(hook, "execution_device", None) for hook in hooks]
        device = torch.device(next((place for place in devices if place is not None), device))
    return device, dtype if dtype.is_floating_point and dtype.itemsize > 1 else torch.float32
