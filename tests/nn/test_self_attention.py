from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mmattn.errors import UsageError
from mmattn.nn import RotaryEmbedding, SelfAttention
from mmattn.ops.cache import KVCache
from mmattn.ops.masks import sliding_window_mask
from mmattn.ops.rotary import apply_rotary
from mmattn.ops.segments import Segments

BATCH, LENGTH, EMBED_DIM = 3, 11, 24


@pytest.fixture
def x() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(BATCH, LENGTH, EMBED_DIM, dtype=torch.float64)


def make(seed: int = 2, **options) -> SelfAttention:
    torch.manual_seed(seed)
    return SelfAttention(EMBED_DIM, 6, **options).double().eval()


def by_hand(module: SelfAttention, x: Tensor, allowed: Tensor) -> Tensor:
    """One head after another, from the definition."""
    query, key, value = (getattr(module, f"{name}_proj")(x) for name in "qkv")
    heads, group, size = module.num_heads, module.num_heads // module.num_kv_heads, module.head_dim
    outs = []
    for head in range(heads):
        q = query[..., head * size : (head + 1) * size]
        kv = slice(head // group * size, (head // group + 1) * size)
        k, v = key[..., kv], value[..., kv]
        if module.q_norm is not None and module.k_norm is not None:
            q, k = module.q_norm(q), module.k_norm(k)
        if module.rotary is not None:
            positions = torch.arange(x.shape[1])
            base = module.rotary.base
            q = apply_rotary(q.unsqueeze(1), positions, base=base).squeeze(1)
            k = apply_rotary(k.unsqueeze(1), positions, base=base).squeeze(1)
        scores = q @ k.transpose(1, 2) * (size**-0.5 if module.scale is None else module.scale)
        outs.append(scores.masked_fill(~allowed, -math.inf).softmax(-1) @ v)
    return module.out_proj(torch.cat(outs, dim=-1))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_kv_heads": 2, "is_causal": True},
        {"num_kv_heads": 1, "head_dim": 7, "bias": False, "out_bias": True, "scale": 0.3},
        {"qk_norm": "rms", "num_kv_heads": 3},
        {"qk_norm": "layer", "rotary": RotaryEmbedding(4, base=100.0), "is_causal": True},
    ],
)
@torch.no_grad()
def test_equals_the_definition(x: Tensor, options: dict) -> None:
    module = make(**options)
    allowed = torch.ones(LENGTH, LENGTH, dtype=torch.bool)
    expected = by_hand(module, x, allowed.tril() if module.is_causal else allowed)
    torch.testing.assert_close(module(x), expected, rtol=1e-11, atol=1e-11)


CACHED = [
    {},
    {"num_kv_heads": 2},
    {"num_kv_heads": 1, "qk_norm": "rms"},
    {"num_kv_heads": 3, "rotary": RotaryEmbedding(4)},
]


def make_cache(module: SelfAttention, **options) -> KVCache:
    return KVCache(
        BATCH, module.num_kv_heads, module.head_dim, max_length=LENGTH, dtype=torch.float64, device="cpu", **options
    )


@pytest.mark.parametrize("options", CACHED)
@pytest.mark.parametrize("chunks", [[1] * LENGTH, [4, 1, 1, 5], [LENGTH]])
@torch.no_grad()
def test_cached_steps_equal_the_full_pass(x: Tensor, options: dict, chunks: list[int]) -> None:
    module = make(is_causal=True, **options)
    cache = make_cache(module, initial_length=2)
    steps = [module(part, cache=cache) for part in x.split(chunks, dim=1)]
    torch.testing.assert_close(torch.cat(steps, dim=1), module(x), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("options", CACHED)
@pytest.mark.parametrize("chunks", [[1] * LENGTH, [5, 1, 4, 1]])
@torch.no_grad()
def test_windowed_cache_equals_a_window_mask(x: Tensor, options: dict, chunks: list[int]) -> None:
    module = make(is_causal=True, **options)
    window = 3
    cache = make_cache(module, window=window)
    steps = [module(part, cache=cache) for part in x.split(chunks, dim=1)]
    full = module(x, attn_mask=sliding_window_mask(LENGTH, LENGTH, window))
    torch.testing.assert_close(torch.cat(steps, dim=1), full, rtol=1e-11, atol=1e-11)


@torch.no_grad()
def test_window_combines_with_an_attn_mask(x: Tensor) -> None:
    module = make(is_causal=True)
    allowed = torch.ones(LENGTH, LENGTH, dtype=torch.bool)
    allowed[:, 5] = False
    allowed[5, 4] = True
    full = module(x, attn_mask=allowed & sliding_window_mask(LENGTH, LENGTH, 3))
    boolean = module(x, attn_mask=allowed, cache=make_cache(module, window=3))
    bias = torch.zeros(LENGTH, LENGTH, dtype=torch.float64).masked_fill(~allowed, -math.inf)
    floating = module(x, attn_mask=bias, cache=make_cache(module, window=3))
    torch.testing.assert_close(boolean, full, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(floating, full, rtol=1e-11, atol=1e-11)


@torch.no_grad()
def test_rotary_positions_and_shared_tables(x: Tensor) -> None:
    module = make(rotary=RotaryEmbedding(4))
    assert module.rotary is not None
    shifted = torch.arange(LENGTH) + 17
    # Only distances count (arXiv 2104.09864, eq. 16).
    torch.testing.assert_close(module(x, positions=shifted), module(x), rtol=1e-10, atol=1e-10)
    stretched = torch.arange(LENGTH) * 3
    tables = module.rotary(stretched, torch.float64)
    assert torch.equal(module(x, positions=tables), module(x, positions=stretched))
    assert not torch.allclose(module(x, positions=stretched), module(x))
    per_row = stretched.expand(BATCH, LENGTH)
    torch.testing.assert_close(module(x, positions=per_row), module(x, positions=stretched), rtol=1e-11, atol=1e-11)


@torch.no_grad()
def test_a_masked_key_has_no_influence(x: Tensor) -> None:
    module = make(num_kv_heads=2)
    key_mask = torch.ones(BATCH, LENGTH, dtype=torch.bool)
    key_mask[:, 7:] = False
    changed = x.clone()
    changed[:, 7:] = math.nan
    torch.testing.assert_close(module(changed, key_mask=key_mask)[:, :7], module(x[:, :7]), rtol=1e-11, atol=1e-11)


def test_dropout_acts_in_training_only(x: Tensor) -> None:
    module = make(dropout_p=0.5)
    assert torch.equal(module(x), module(x))
    module.train()
    assert not torch.equal(module(x), module(x))


@pytest.mark.parametrize("length", [1, 2])
def test_gradients(x: Tensor, length: int) -> None:
    module = make(num_kv_heads=2, is_causal=True, qk_norm="rms", rotary=RotaryEmbedding(4))
    inputs = x[:2, :length].clone().requires_grad_()
    assert torch.autograd.gradcheck(module, inputs)
    module(inputs).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 5}, "embed_dim 24 does not divide into num_heads 5: set head_dim"),
        ({"num_heads": 0}, "num_heads is 0, it must be at least 1"),
        ({"num_heads": 6, "head_dim": 0}, "head_dim is 0, it must be at least 1"),
        ({"num_heads": 6, "backend": "flsh"}, "unknown attention backend 'flsh'; use one of: auto"),
        ({"num_heads": 6, "dropout_p": 1.0}, "dropout_p is 1.0, it must be at least 0 and below 1"),
        ({"num_heads": 6, "num_kv_heads": 4}, "num_kv_heads 4 does not divide num_heads 6"),
        ({"num_heads": 6, "num_kv_heads": 0}, "num_kv_heads 0 does not divide num_heads 6"),
        ({"num_heads": 6, "rotary": RotaryEmbedding(6)}, "rotary has head_dim 6, the heads have 4"),
        ({"num_heads": 6, "qk_norm": "batch"}, "norm 'batch' is unknown: use 'layer' or 'rms'"),
    ],
)
def test_wrong_sizes_are_named(options: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        SelfAttention(EMBED_DIM, **options)


@torch.no_grad()
def test_wrong_arguments_are_named(x: Tensor) -> None:
    module = make()
    with pytest.raises(UsageError, match=r"x has shape \[3, 11, 23\], expected \[batch, length, 24\]"):
        module(x[..., 1:])
    with pytest.raises(UsageError, match=r"x has shape \[11, 24\], expected \[batch, length, 24\]"):
        module(x[0])
    with pytest.raises(UsageError, match="no rotary embedding to use them"):
        module(x, positions=torch.arange(LENGTH))
    with pytest.raises(UsageError, match="a cache with a window needs is_causal=True"):
        module(x, cache=make_cache(module, window=3))
    with pytest.raises(UsageError, match=r"described by mmattn\.ops\.segments\.Segments, not by a list"):
        module(x[0], segments=[4, 7])  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="SelfAttention: x has 11 rows, its segments 10: they must agree"):
        make(rotary=RotaryEmbedding(4))(x[0], segments=Segments.of([3, 7]))
    with pytest.raises(UsageError, match="positions are a list, they must be a tensor"):
        make(rotary=RotaryEmbedding(4))(x, positions=[0, 1])  # type: ignore[arg-type]
    causal = make(is_causal=True)
    window = make_cache(causal, window=3)
    causal(x[:, :5], cache=window)
    with pytest.raises(UsageError, match=r"attn_mask \[2, 7\] does not broadcast to \[B, H, Lq, Lk\] = \[3, 6, 2, 4\]"):
        causal(x[:, :2], cache=window, attn_mask=torch.ones(2, 7, dtype=torch.bool))
    cache = make_cache(module)
    module(x, cache=cache)
    with pytest.raises(UsageError, match="KVCache is full"):
        module(x[:, :1], cache=cache)
    rotary = make(rotary=RotaryEmbedding(4))
    with pytest.raises(UsageError, match=r"positions for \[batch, length\] = \[1, 7\] do not fit x of \[3, 11\]"):
        rotary(x, positions=torch.arange(7))
