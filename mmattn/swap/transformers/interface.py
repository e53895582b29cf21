"""The attention function that transformers calls: its arguments, in mmattn's terms.

Shapes: B batch, H query heads, G key/value heads, Lq / Lk lengths, D head_dim.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmattn.errors import UsageError
from mmattn.ops.attention import attention
from mmattn.ops.masks import causal_mask
from mmattn.swap.attend import attend, reference_kind
from mmattn.swap.transformers.settings import (
    MASKS_LIKE_SDPA,
    SERVED,
    Settings,
    implementation_of,
    settings_of,
)
from mmattn.swap.transformers.weights import are_weights_wanted

CHANGING = frozenset({"softcap", "s_aux", "sinks", "indices", "block_indices", "head_mask", "layer_head_mask"})


def mmattn_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **keywords: Any,
) -> tuple[Tensor, Tensor | None]:
    """`mmattn.attention`, as transformers calls an attention function for a module: query [B, H, Lq, D], key and value
    [B, G, Lk, D], not repeated; values may be narrower.

    Args:
        attention_mask: boolean (True = may attend) or float (added to the scores), [B, H, Lq, Lk], where axes of size 1
            broadcast. None: nothing is masked, or, as in stock's sdpa, a causal module is causal.
        is_causal: overrides the module's own flag. Cross-attention never is.
        position_bias: added to the scores, [1 or B, H, Lq, Lk].

    Returns:
        (output [B, Lq, H, D], weights [B, H, Lq, Lk] where they are asked for, else None).

    Raises:
        UsageError: for a keyword that changes the result and that ours does not know, or another kind of mask.
        BackendError: when the layer's backend cannot serve the call.
    """
    settings, implementation = settings_of(module), implementation_of(module.config)
    _check(settings, implementation, attention_mask, key, keywords)
    if key.shape[0] != query.shape[0]:  # one picture for all of a Q-Former's rows
        key, value = (tensor.expand(query.shape[0], -1, -1, -1) for tensor in (key, value))
    causal = attention_mask is None and _is_causal(settings, module, implementation, query, is_causal)
    if causal and key.shape[2] != query.shape[2]:
        key, value, position_bias, attention_mask = _from_first_key(query, key, value, position_bias)
        causal = attention_mask is None
    attn_mask, key_mask = split_mask(attention_mask, key)
    value_dim = value.shape[-1]
    if value_dim < key.shape[-1]:  # Conditional DETR's positions stand beside what is attended to
        value = F.pad(value, (0, key.shape[-1] - value_dim))
    output, weights = compute(
        module,
        query,
        key,
        value,
        attn_mask=with_bias(attn_mask, position_bias, settings),
        key_mask=key_mask,
        is_causal=causal,
        scale=scaling,
        dropout_p=dropout if module.training else 0.0,
        with_weights=are_weights_wanted(module, implementation, keywords),
    )
    return output[..., :value_dim].transpose(1, 2).contiguous(), weights


def compute(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *, with_weights: bool, **arguments: Any
) -> tuple[Tensor, Tensor | None]:
    """`mmattn.attention` with a module's settings: output [B, H, Lq, D], and the weights if wanted (never within
    `verify`'s references)."""
    settings = settings_of(module)
    arguments |= {"role": settings.named_role, "backend": settings.backend, "caller": module}
    if with_weights and reference_kind() is None:
        return attention(query, key, value, return_weights=True, **arguments)
    return attend(query, key, value, **arguments), None


def split_mask(mask: Tensor | None, key: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """A mask as (attn_mask with four axes, key_mask [B, Lk]): padding is taken off the general mask, where it is
    fast. At most one of the two is there."""
    if mask is None:
        return None, None
    if mask.dim() < 4:
        mask = mask[(None,) * (4 - mask.dim())]  # axes that are not there broadcast, as in a sum
    if mask.dtype is torch.bool and mask.shape[1] == 1 and mask.shape[-1] == key.shape[2] and _is_padding(mask):
        return None, mask[:, 0, 0].expand(key.shape[0], -1)
    return mask, None


def _is_padding(mask: Tensor) -> bool:
    """Whether all queries of a row may see the same keys. Values are read on a CPU only, where it is cheap beside
    attention; elsewhere it would wait for the device, and a traced graph cannot."""
    if mask.shape[2] == 1 or mask.stride(2) == 0:
        return True
    if mask.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    first = mask[:, :, :1]
    return torch.equal(first, mask[:, :, -1:]) and bool((mask == first).all())


def with_bias(mask: Tensor | None, bias: Tensor | None, settings: Settings) -> Tensor | None:
    """A mask and T5's relative positions as one."""
    if bias is None or (settings.role == "cross" and _is_zero(bias)):
        return mask
    if mask is None:
        return bias
    if mask.dtype is torch.bool:
        return bias.masked_fill(~mask, float("-inf"))
    return bias + mask


def _is_zero(bias: Tensor) -> bool:
    """T5's cross-attention has no positions, and passes zeros; without them padding stays on the fast path."""
    if bias.requires_grad or bias.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return not bias.any()


def _is_causal(
    settings: Settings, module: nn.Module, implementation: str | None, query: Tensor, is_causal: bool | None
) -> bool:
    """Whether a call without a mask is causal. Where stock's is sdpa, as the module says, and where it says nothing:
    wrong for cross-attention, which here never is. Where it is eager never: that gets a mask."""
    if settings.role == "cross" or implementation not in MASKS_LIKE_SDPA or query.shape[2] == 1:
        return False
    return bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)


def _from_first_key(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(key, value, bias, mask) for stock's causality, which counts from the first key on, and mmattn's from the last
    one back. More keys than queries are a static cache's first step: the rest of it is empty."""
    num_queries, num_keys = query.shape[2], key.shape[2]
    if num_keys < num_queries:
        return key, value, bias, causal_mask(num_queries, num_keys, offset=0, device=query.device)
    bias = None if bias is None else bias[..., :num_queries]
    return key[:, :, :num_queries], value[:, :, :num_queries], bias, None


def _check(
    settings: Settings, implementation: str | None, attention_mask: Any, key: Tensor, keywords: dict[str, Any]
) -> None:
    """Raise `UsageError` for what would otherwise be dropped in silence."""
    if implementation not in SERVED or not (attention_mask is None or isinstance(attention_mask, Tensor)):
        kind = f"{implementation} made a {type(attention_mask).__name__} as its mask"
        raise UsageError(
            f"{settings.where}: {kind}, which mmattn's attention cannot read; call "
            'model.set_attn_implementation("sdpa"), or restore() the swap'
        )
    for name, given in keywords.items():
        if given is None or given is False:
            continue
        if name in CHANGING or name in settings.unsupported:
            raise UsageError(
                f"{settings.where}: {name}= changes the result, and mmattn's attention does not support it"
            )
        if attention_mask is None and _needs_mask(name, given, key):
            raise UsageError(f"{settings.where}: {name}={_shown(given)} without an attention_mask that says the same")


def _needs_mask(name: str, given: Any, key: Tensor) -> bool:
    """Windows and packed rows are in stock's masks; a call that has them and no mask would lose them."""
    if name == "sliding_window":
        return isinstance(given, int) and key.shape[2] > given
    if name in ("cu_seq_lens_q", "cu_seq_lens_k"):
        return isinstance(given, Tensor) and given.numel() > 2
    return False


def _shown(value: Any) -> str:
    return str(list(value.shape)) if isinstance(value, Tensor) else str(value)
