"""The specification against the definition, written out position by position."""

import math

import pytest
import torch

from mmattn.ops.attention import attention
from tests.ops.cases import (
    ATTN_MASKS,
    KEY_MASKS,
    SHAPES,
    Shape,
    allowed_everywhere,
    generator_for,
    make_attn_mask,
    make_inputs,
    make_key_mask,
)


def by_definition(query, key, value, allowed, bias, scale):
    """Loops over rows; float64 [B, H, Lq, D] and weights."""
    batch, heads, queries, head_dim = query.shape
    group = heads // key.shape[1]
    output = torch.zeros(batch, heads, queries, head_dim, dtype=torch.float64)
    weights = torch.zeros(batch, heads, queries, key.shape[2], dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            for i in range(queries):
                keys = [j for j in range(key.shape[2]) if allowed[b, h, i, j]]
                if not keys:
                    continue
                scores = [scale * float(query[b, h, i] @ key[b, h // group, j]) + float(bias[b, h, i, j]) for j in keys]
                top = max(scores)
                parts = [math.exp(score - top) for score in scores]
                for j, part in zip(keys, parts, strict=True):
                    weights[b, h, i, j] = part / math.fsum(parts)
                    output[b, h, i] += weights[b, h, i, j] * value[b, h // group, j]
    return output, weights


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("attn_kind", ATTN_MASKS)
@pytest.mark.parametrize("shape", SHAPES[:5], ids=str)
def test_eager_is_the_definition(shape, attn_kind, is_causal):
    key_kind = KEY_MASKS[(ATTN_MASKS.index(attn_kind) + SHAPES.index(shape) + is_causal) % len(KEY_MASKS)]
    generator = generator_for(SHAPES.index(shape), is_causal)
    query, key, value = make_inputs(shape, torch.float64, generator)
    attn_mask = make_attn_mask(attn_kind, shape, generator)
    key_mask = make_key_mask(key_kind, shape, generator)
    output, weights = attention(
        query,
        key,
        value,
        attn_mask=attn_mask,
        key_mask=key_mask,
        is_causal=is_causal,
        scale=0.37,
        backend="eager",
        return_weights=True,
    )
    allowed = allowed_everywhere(shape, attn_mask, key_mask, is_causal)
    bias = torch.zeros(weights.shape, dtype=torch.float64)
    if attn_mask is not None and attn_mask.is_floating_point():
        bias = bias + attn_mask
    expected, expected_weights = by_definition(query, key, value, allowed, bias, 0.37)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(weights, expected_weights, rtol=0, atol=1e-14)
    assert torch.equal(weights == 0, ~allowed | (weights == 0))


def test_gradients_by_finite_differences():
    shape = Shape(1, 2, 1, 3, 5, 2)
    generator = generator_for(3)
    inputs = [t.requires_grad_() for t in make_inputs(shape, torch.float64, generator)]
    mask = make_attn_mask("empty-rows", shape, generator)
    key_mask = make_key_mask("gaps", shape, generator)

    def function(query, key, value):
        return attention(query, key, value, attn_mask=mask, key_mask=key_mask, is_causal=True, backend="eager")

    assert torch.autograd.gradcheck(function, inputs)


def test_half_types_are_accumulated_in_float32():
    # 4097 equal weights: a bfloat16 running sum would stop growing at 256.
    query = torch.zeros(1, 1, 1, 8, dtype=torch.bfloat16)
    key = torch.zeros(1, 1, 4097, 8, dtype=torch.bfloat16)
    value = torch.ones(1, 1, 4097, 8, dtype=torch.bfloat16)
    output = attention(query, key, value, backend="eager")
    assert output.dtype is torch.bfloat16
    assert torch.equal(output, torch.ones_like(output))


def test_weights_are_those_before_dropout():
    query, key, value = make_inputs(SHAPES[0], torch.float32, generator_for(5))
    _, plain = attention(query, key, value, return_weights=True)
    _, dropped = attention(query, key, value, return_weights=True, dropout_p=0.5)
    assert torch.equal(plain, dropped)


def test_autocast_leaves_the_specification_in_float32():
    query, key, value = make_inputs(SHAPES[0], torch.bfloat16, generator_for(6))
    expected = attention(query, key, value, backend="eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = attention(query.float(), key.float(), value, backend="eager")
    assert torch.equal(got, expected)
