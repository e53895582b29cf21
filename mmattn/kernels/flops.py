"""How many operations the kernels take, for `torch.utils.flop_counter`, which looks into no kernel by itself: what it
counts, and the MFU of training, would be without attention. Import it before a `FlopCounterMode` is made; needs triton.

As torch counts its own attention: products and sums of whole score matrices, masks and causality aside; a backward,
which computes the scores once more, as two and a half times the forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import register_flop_formula

# They define the operations.
from mmattn.kernels import decode as _decode  # noqa: F401
from mmattn.kernels import packed_rows as _packed_rows  # noqa: F401
from mmattn.kernels import short_keys as _short_keys  # noqa: F401
from mmattn.kernels import short_keys_maps as _short_keys_maps  # noqa: F401

_OPERATIONS = torch.ops.mmattn


@register_flop_formula([_OPERATIONS.short_key_attention, _OPERATIONS.decode_attention], get_raw=True)
def attention_flops(query: Tensor, key: Tensor, *_: Any, out_val: Any = None) -> int:
    """Of query [B, H, Lq, D] and key [B, G, Lk, D]."""
    return 4 * query.numel() * key.shape[2]


@register_flop_formula(_OPERATIONS.short_key_attention_backward, get_raw=True)
def attention_backward_flops(grad_output: Tensor, query: Tensor, key: Tensor, *_: Any, out_val: Any = None) -> int:
    """Of the same, with the gradient of the output before them."""
    return attention_flops(query, key) * 5 // 2


@register_flop_formula(_OPERATIONS.short_key_attention_maps, get_raw=True)
def maps_flops(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    attn_mask: Tensor | None,
    scale: float,
    keys: Tensor,
    first_row: int,
    heads: Sequence[int] | None,
    *_: Any,
    out_val: Any = None,
) -> int:
    """Attention, and the scores of keys [R, T] once more, for all heads or those chosen."""
    num_heads = query.shape[1] if heads is None else len(heads)
    return attention_flops(query, key) + 2 * num_heads * query.shape[2] * query.shape[3] * keys.numel()


@register_flop_formula(_OPERATIONS.packed_rows_attention, get_raw=True)
def packed_flops(
    query: Tensor, key: Tensor, value: Tensor, query_starts: Tensor, key_starts: Tensor, *_: Any, out_val: Any = None
) -> int:
    """Of query [N, H, D], key [M, G, D] and sequences that start at [S + 1].

    Lengths of fake tensors are not known: as if all sequences were equally long.
    """
    if isinstance(query_starts, FakeTensor) or query_starts.is_meta:
        pairs = query.shape[0] * key.shape[0] // max(1, query_starts.shape[0] - 1)
    else:
        pairs = int((query_starts.diff().long() * key_starts.diff().long()).sum())
    return 4 * query.shape[1] * query.shape[2] * pairs


@register_flop_formula(_OPERATIONS.packed_rows_attention_backward, get_raw=True)
def packed_backward_flops(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    query_starts: Tensor,
    key_starts: Tensor,
    *_: Any,
    out_val: Any = None,
) -> int:
    """Of the same, with the gradient of the output before them, and output and log-sum-exp behind value."""
    return packed_flops(query, key, value, query_starts, key_starts) * 5 // 2
