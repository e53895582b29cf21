"""What maps from the forward's own pass are held to, on the interpreter and on a card. Needs triton when imported."""

from __future__ import annotations

import torch

from mmattn.kernels.short_keys import short_key_attention
from mmattn.kernels.short_keys_maps import short_key_attention_maps
from tests.ops.cases import generator_for
from tests.tolerance import check_within, eager


def keys_of(shape, count, seed):
    """Some keys of each row, in no order."""
    draws = [torch.randperm(shape.keys, generator=generator_for(seed, row))[:count] for row in range(shape.batch)]
    return torch.stack(draws)


def check_maps(tensors, keys, *, first_row=0, heads=None, average=False, key_mask=None, attn_mask=None, scale=0.3):
    """The kernel's maps under the tolerance rule, and its output and log-sum-exp beside the plain forward's."""
    query, key, _ = tensors
    arguments = (None if key_mask is None else key_mask[:, None], attn_mask, scale)
    output, lse, maps = short_key_attention_maps(*tensors, *arguments, keys, first_row, heads, average)
    plain = short_key_attention(*tensors, *arguments)
    assert torch.equal(output, plain[0])
    assert torch.equal(lse, plain[1])
    assert maps.dtype is torch.float32
    rows = slice(first_row, first_row + len(keys))
    expected = []
    for dtype in (torch.float64, torch.float32):  # half types are computed in float32 on both sides
        inputs = [tensor.detach().to(dtype) for tensor in tensors]
        _, weights = eager(*inputs, return_weights=True, key_mask=key_mask, attn_mask=attn_mask, scale=scale)
        weights = weights[rows] if heads is None else weights[rows][:, heads]
        index = keys.long().clamp(0, key.shape[2] - 1)[:, None, None].expand(*weights.shape[:3], -1)
        is_there = (keys >= 0) & (keys < key.shape[2])
        kept = weights.gather(3, index) * is_there[:, None, None]
        expected.append(kept.mean(1, keepdim=True) if average else kept)
    largest = scale * (query.double().norm(dim=-1).max() * key.double().nan_to_num().norm(dim=-1).max()).item()
    slack = 2 * torch.finfo(torch.float32).eps * (1 + abs(largest))
    check_within(maps, expected[1], expected[0], factor=2, what="maps", unavoidable=slack)
    return maps
