"""Properties that hold for any sizes and masks, drawn by hypothesis, in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmattn.ops import masks
from mmattn.ops.attention import attention
from mmattn.ops.cache import KVCache
from mmattn.ops.rotary import apply_rotary

pytestmark = pytest.mark.parametrize("backend", ["eager", "sdpa"])
sizes = st.tuples(
    st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 9), st.integers(1, 13), st.integers(1, 9)
)
seeds = st.integers(0, 2**31 - 1)
quick = settings(max_examples=40, deadline=None, derandomize=True)


def draw(size, generator):
    batch, kv_heads, group, queries, keys, head_dim = size
    options = {"generator": generator, "dtype": torch.float64}
    query = torch.randn(batch, kv_heads * group, queries, head_dim, **options)
    key, value = (torch.randn(batch, kv_heads, keys, head_dim, **options) for _ in range(2))
    key_mask = torch.rand(batch, keys, generator=generator) < 0.7
    attn_mask = torch.rand(batch, 1, queries, keys, generator=generator) < 0.8
    return query, key, value, key_mask, attn_mask


def assert_same(got, expected):
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


@quick
@given(size=sizes, seed=seeds)
def test_permuting_keys_changes_nothing(backend, size, seed):
    generator = torch.Generator().manual_seed(seed)
    query, key, value, key_mask, attn_mask = draw(size, generator)
    order = torch.randperm(key.shape[2], generator=generator)
    expected = attention(query, key, value, key_mask=key_mask, attn_mask=attn_mask, backend=backend)
    got = attention(
        query,
        key[:, :, order],
        value[:, :, order],
        key_mask=key_mask[:, order],
        attn_mask=attn_mask[..., order],
        backend=backend,
    )
    assert_same(got, expected)


@quick
@given(size=sizes, seed=seeds)
def test_permuting_queries_permutes_the_output(backend, size, seed):
    generator = torch.Generator().manual_seed(seed)
    query, key, value, key_mask, attn_mask = draw(size, generator)
    order = torch.randperm(query.shape[2], generator=generator)
    expected = attention(query, key, value, key_mask=key_mask, attn_mask=attn_mask, backend=backend)[:, :, order]
    query, attn_mask = query[:, :, order], attn_mask[:, :, order]
    assert_same(attention(query, key, value, key_mask=key_mask, attn_mask=attn_mask, backend=backend), expected)


@quick
@given(size=sizes, seed=seeds, is_causal=st.booleans(), poison=st.sampled_from([float("nan"), float("inf"), 1e300]))
def test_a_masked_key_has_no_influence(backend, size, seed, is_causal, poison):
    generator = torch.Generator().manual_seed(seed)
    query, key, value, key_mask, attn_mask = draw(size, generator)
    arguments = {"key_mask": key_mask, "attn_mask": attn_mask, "is_causal": is_causal, "backend": backend}
    expected = attention(query, key, value, **arguments)
    masked = ~key_mask[:, None, :, None]
    got = attention(query, key.masked_fill(masked, poison), value.masked_fill(masked, poison), **arguments)
    assert_same(got, expected)


@quick
@given(size=sizes, seed=seeds, is_causal=st.booleans())
def test_padding_more_keys_changes_nothing(backend, size, seed, is_causal):
    """Keys added on the left keep the alignment of a causal mask."""
    generator = torch.Generator().manual_seed(seed)
    query, key, value, key_mask, _ = draw(size, generator)
    expected = attention(query, key, value, key_mask=key_mask, is_causal=is_causal, backend=backend)
    junk = torch.full_like(key[:, :, :1], float("nan")).repeat(1, 1, 3, 1)
    longer = torch.cat([torch.zeros_like(key_mask[:, :1]).repeat(1, 3), key_mask], dim=1)
    got = attention(
        query,
        torch.cat([junk, key], dim=2),
        torch.cat([junk, value], dim=2),
        key_mask=longer,
        is_causal=is_causal,
        backend=backend,
    )
    assert_same(got, expected)


@quick
@given(size=sizes, seed=seeds)
def test_masks_combine_by_and(backend, size, seed):
    query, key, value, key_mask, attn_mask = draw(size, torch.Generator().manual_seed(seed))
    causal = masks.causal_mask(query.shape[2], key.shape[2])
    both = attn_mask & key_mask[:, None, None] & causal
    got = attention(query, key, value, key_mask=key_mask, attn_mask=attn_mask, is_causal=True, backend=backend)
    assert_same(got, attention(query, key, value, attn_mask=both, backend=backend))
    bias = torch.zeros_like(both, dtype=torch.float64).masked_fill(~both, float("-inf"))
    assert_same(attention(query, key, value, attn_mask=bias, backend=backend), got)


@quick
@given(size=sizes, seed=seeds, steps=st.lists(st.integers(1, 4), min_size=1, max_size=5), first=st.integers(1, 5))
def test_cached_steps_equal_the_full_pass(backend, size, seed, steps, first):
    batch, kv_heads, group, _, _, head_dim = size
    length = sum(steps)
    generator = torch.Generator().manual_seed(seed)
    query, key, value, _, _ = draw((batch, kv_heads, group, length, length, 2 * head_dim), generator)
    positions = torch.arange(length)
    query, key = apply_rotary(query, positions), apply_rotary(key, positions)
    expected = attention(query, key, value, is_causal=True, backend=backend)
    cache = KVCache(
        batch, kv_heads, 2 * head_dim, max_length=length, dtype=torch.float64, device="cpu", initial_length=first
    )
    outputs = []
    for query_part, key_part, value_part in zip(*(t.split(steps, dim=2) for t in (query, key, value)), strict=True):
        keys, values = cache.update(key_part, value_part)
        outputs.append(attention(query_part, keys, values, is_causal=True, backend=backend))
    assert cache.length == cache.position == length
    assert_same(torch.cat(outputs, dim=2), expected)


@quick
@given(size=sizes, seed=seeds, steps=st.lists(st.integers(1, 4), min_size=1, max_size=8), window=st.integers(1, 6))
def test_windowed_steps_equal_the_banded_full_pass(backend, size, seed, steps, window):
    batch, kv_heads, group, _, _, head_dim = size
    length = sum(steps)
    generator = torch.Generator().manual_seed(seed)
    query, key, value, _, _ = draw((batch, kv_heads, group, length, length, head_dim), generator)
    band = masks.sliding_window_mask(length, length, window)
    expected = attention(query, key, value, attn_mask=band, backend=backend)
    cache = KVCache(
        batch, kv_heads, head_dim, max_length=length, dtype=torch.float64, device="cpu", initial_length=1, window=window
    )
    outputs = []
    for query_part, key_part, value_part in zip(*(t.split(steps, dim=2) for t in (query, key, value)), strict=True):
        keys, values = cache.update(key_part, value_part)
        band = masks.sliding_window_mask(query_part.shape[2], keys.shape[2], window)
        outputs.append(attention(query_part, keys, values, attn_mask=band, backend=backend))
        assert cache.length <= window
    assert cache.position == length
    assert_same(torch.cat(outputs, dim=2), expected)
