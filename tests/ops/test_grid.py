"""Every usable backend against the float64 specification, forward and backward, under the tolerance rule."""

import functools

import pytest
import torch

from mmattn.ops.attention import attention
from mmattn.ops.registry import TABLE
from tests.ops.cases import (
    ATTN_MASKS,
    KEY_MASKS,
    SHAPES,
    generator_for,
    make_attn_mask,
    make_inputs,
    make_key_mask,
    mask_cases,
)
from tests.tolerance import check_attention

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Backends that compile have their own, smaller grid in test_flex.py.
BACKENDS = [b.name for b in TABLE if "cpu" in b.limits.dtypes and b.name != "flex" and b.unusable("cpu") is None]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_masks(backend, shape, dtype):
    # All of them come up over the shapes.
    every = 2 if dtype is torch.float32 and backend != "eager" else 7
    for attn_kind, key_kind, is_causal in mask_cases(SHAPES.index(shape), every):
        generator = generator_for(SHAPES.index(shape), ATTN_MASKS.index(attn_kind), KEY_MASKS.index(key_kind))
        query, key, value = make_inputs(shape, dtype, generator)
        attn_mask = make_attn_mask(attn_kind, shape, generator)
        if attn_mask is not None and attn_mask.is_floating_point():
            attn_mask = attn_mask.to(dtype)
        check_attention(
            functools.partial(attention, backend=backend),
            query,
            key,
            value,
            attn_mask=attn_mask,
            key_mask=make_key_mask(key_kind, shape, generator),
            is_causal=is_causal,
            what=f"{backend} {dtype} {shape} attn {attn_kind} key {key_kind} causal {is_causal}",
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_of_a_float_bias(backend, dtype):
    for shape in SHAPES[:5]:
        generator = generator_for(SHAPES.index(shape), 41)
        query, key, value = make_inputs(shape, dtype, generator)
        bias = make_attn_mask("bias-heads", shape, generator)
        assert bias is not None
        check_attention(
            functools.partial(attention, backend=backend),
            query,
            key,
            value,
            attn_mask=bias.to(dtype),
            key_mask=make_key_mask("right", shape, generator),
            bias_gradient=True,
            what=f"{backend} {dtype} {shape}",
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("factor", [1e-3, 30.0, 3000.0])
def test_small_and_huge_scores(backend, factor):
    for shape in SHAPES[:4]:
        query, key, value = make_inputs(shape, torch.float32, generator_for(SHAPES.index(shape), 43))
        check_attention(
            functools.partial(attention, backend=backend),
            query * factor,
            key,
            value,
            is_causal=True,
            what=f"{backend} {shape} scores x {factor}",
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strongly_negative_scores(backend, dtype):
    """Every log-sum-exp below -100: where cuDNN's masked backward makes NaN."""
    for shape in SHAPES[:4]:
        generator = generator_for(SHAPES.index(shape), 47)
        query, key, value = make_inputs(shape, dtype, generator)
        query, key = query.abs() + 4, -(key.abs() + 4)
        attn_mask = make_attn_mask("boolean", shape, generator)
        check_attention(
            functools.partial(attention, backend=backend),
            query,
            key,
            value,
            attn_mask=attn_mask,
            scale=3.0,
            has_rounded_products=backend == "sdpa" and dtype in (torch.bfloat16, torch.float16),
            what=f"{backend} {dtype} {shape}",
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_views(backend):
    """[B, L, H, D] storage, sliced caches, expanded keys: strides of every kind."""
    for number, shape in enumerate(SHAPES):
        generator = generator_for(number, 53)
        query, key, value = make_inputs(shape, torch.float32, generator)
        query = query.transpose(1, 2).contiguous().transpose(1, 2)
        key = torch.cat([key, torch.full_like(key, float("nan"))], dim=2)[:, :, : shape.keys]
        value = value.transpose(2, 3).contiguous().transpose(2, 3)
        key_mask = make_key_mask(KEY_MASKS[number % len(KEY_MASKS)], shape, generator)
        arguments = {"key_mask": key_mask, "is_causal": bool(number % 2), "backend": backend}
        got = attention(query, key, value, **arguments)
        expected = attention(query.contiguous(), key.contiguous(), value.contiguous(), **arguments)
        torch.testing.assert_close(got, expected)
        one = attention(query, key[:, :, :1].expand_as(key), value, **arguments)
        torch.testing.assert_close(one, attention(query, key[:, :, :1].repeat(1, 1, shape.keys, 1), value, **arguments))


@pytest.mark.parametrize("scale", [-0.7, -1e-35, 0.0, 1e-35])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_scales_that_are_not_positive(backend, dtype, scale):
    """Torch's CPU kernel makes NaN of them where it is causal."""
    for number in (1, 3, 6):
        shape = SHAPES[number]
        generator = generator_for(number, 43)
        query, key, value = make_inputs(shape, dtype, generator)
        for key_kind in ("none", "gaps"):
            for is_causal in (False, True):
                check_attention(
                    functools.partial(attention, backend=backend),
                    query,
                    key,
                    value,
                    key_mask=make_key_mask(key_kind, shape, generator),
                    is_causal=is_causal,
                    scale=scale,
                    what=f"{backend} {dtype} {shape} scale {scale} key {key_kind} causal {is_causal}",
                )


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_mask_that_leaves_nothing_passes_zeros_to_all(backend):
    query, key, value = (torch.randn(2, 3, 5, 7, requires_grad=True) for _ in range(3))
    bias = torch.randn(5, 5, requires_grad=True)
    key_mask = torch.zeros(2, 5, dtype=torch.bool)
    attention(query, key, value, attn_mask=bias, key_mask=key_mask, backend=backend).sum().backward()
    for tensor in (query, key, value, bias):
        assert tensor.grad is not None
        assert not tensor.grad.any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sizes", [(0, 7, 11), (2, 0, 11), (2, 7, 0)], ids=["no batch", "no queries", "no keys"])
def test_nothing_to_do(backend, sizes):
    batch, queries, keys = sizes
    query = torch.randn(batch, 6, queries, 5, requires_grad=True)
    key = torch.randn(batch, 3, keys, 5, requires_grad=True)
    value = torch.randn(batch, 3, keys, 5, requires_grad=True)
    for key_mask in (None, torch.ones(batch, keys, dtype=torch.bool)):
        for attn_mask in (None, torch.ones(queries, keys, dtype=torch.bool)):
            for is_causal in (False, True):
                output = attention(
                    query,
                    key,
                    value,
                    key_mask=key_mask,
                    attn_mask=attn_mask,
                    is_causal=is_causal,
                    backend=backend,
                )
                assert output.shape == query.shape
                assert torch.equal(output, torch.zeros_like(output))
                output.sum().backward()
    for tensor in (query, key, value):
        assert tensor.grad is not None
        assert not tensor.grad.any()
