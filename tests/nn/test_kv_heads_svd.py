from __future__ import annotations

from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn

from mmattn.errors import UsageError
from mmattn.nn import CrossAttention, RotaryEmbedding, SelfAttention, convert_kv_heads
from tests.nn.test_kv_heads import CONTEXT_DIM, EMBED_DIM, HEAD_DIM, NUM_HEADS, equal_heads

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def noisy(module: ModuleT) -> ModuleT:
    """Every parameter random, biases included."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module.double()


@pytest.mark.parametrize("num_kv_heads", [1, 2, 3, 6])
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_equal_heads_are_merged_without_loss(num_kv_heads: int, bias: bool) -> None:
    torch.manual_seed(51)
    module = noisy(SelfAttention(EMBED_DIM, NUM_HEADS, bias=bias, is_causal=True))
    equal_heads(module, num_kv_heads)
    x = torch.randn(3, 7, EMBED_DIM).double()
    expected = module(x)
    convert_kv_heads(module, num_kv_heads, how="svd")
    assert module.k_proj.weight.shape == module.v_proj.weight.shape == (num_kv_heads * HEAD_DIM, EMBED_DIM)
    assert (module.k_proj.bias is not None) == (module.q_proj.bias is not None) == bias
    torch.testing.assert_close(module(x), expected, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("num_kv_heads", [6, 2])
@torch.no_grad()
def test_a_context_narrower_than_a_head_needs_one_head_only(num_kv_heads: int) -> None:
    torch.manual_seed(52)
    module = noisy(CrossAttention(EMBED_DIM, NUM_HEADS, context_dim=HEAD_DIM - 1, num_kv_heads=num_kv_heads))
    x, context = torch.randn(4, 5, EMBED_DIM).double(), torch.randn(2, 11, HEAD_DIM - 1).double()
    mask = torch.ones(2, 11, dtype=torch.bool)
    mask[0, 3:] = False
    expected = module(x, context, key_mask=mask)
    convert_kv_heads(module, 1, how="svd")
    torch.testing.assert_close(module(x, context, key_mask=mask), expected, rtol=1e-7, atol=1e-8)


def products(module: CrossAttention) -> tuple[Tensor, Tensor]:
    """For each query head what the scores and what the output depend on, biases of key and value aside."""
    repeats = module.num_heads // module.num_kv_heads
    query = module.q_proj.weight.view(NUM_HEADS, HEAD_DIM, -1)
    key = module.k_proj.weight.view(-1, HEAD_DIM, CONTEXT_DIM).repeat_interleave(repeats, dim=0)
    value = module.v_proj.weight.view(-1, HEAD_DIM, CONTEXT_DIM).repeat_interleave(repeats, dim=0)
    output = module.out_proj.weight.view(-1, NUM_HEADS, HEAD_DIM).movedim(1, 0)
    return query.transpose(1, 2) @ key, output @ value


@torch.no_grad()
def test_it_is_the_nearest_and_nearer_than_the_mean() -> None:
    errors = {}
    for how in ("svd", "mean"):
        torch.manual_seed(53)
        module = noisy(CrossAttention(EMBED_DIM, NUM_HEADS, context_dim=CONTEXT_DIM, bias=False))
        before = products(module)
        convert_kv_heads(module, 2, how=how)
        errors[how] = [(new - old).square().sum().item() for new, old in zip(products(module), before, strict=True)]
    # What no matrix of rank D can do better (Eckart and Young): the squares of the singular values beyond.
    for error, old in zip(errors["svd"], before, strict=True):
        beyond = [torch.linalg.svdvals(group.flatten(0, 1))[HEAD_DIM:].square().sum().item() for group in old.chunk(2)]
        assert error == pytest.approx(sum(beyond), rel=1e-9)
    assert all(svd < 0.8 * mean for svd, mean in zip(errors["svd"], errors["mean"], strict=True))


@torch.no_grad()
def test_both_factors_weigh_alike_and_zero_heads_stay_finite() -> None:
    torch.manual_seed(54)
    module = noisy(CrossAttention(EMBED_DIM, NUM_HEADS, context_dim=CONTEXT_DIM, bias=False))
    convert_kv_heads(module, 1, how="svd")
    shared = module.k_proj.weight.square().sum(dim=1)
    of_queries = module.q_proj.weight.view(NUM_HEADS, HEAD_DIM, -1).square().sum(dim=(0, 2))
    torch.testing.assert_close(shared, of_queries)
    dead = CrossAttention(EMBED_DIM, NUM_HEADS)
    for parameter in dead.parameters():
        parameter.zero_()
    convert_kv_heads(dead, 2, how="svd")
    assert all(parameter.isfinite().all() for parameter in dead.parameters())


def test_what_is_no_product_of_weights_is_refused() -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"qk_norm": "rms"}, "queries and keys are normed"),
        ({"rotary": RotaryEmbedding(HEAD_DIM)}, "queries and keys are rotated by their places"),
    ]
    for options, reason in cases:
        module = SelfAttention(EMBED_DIM, NUM_HEADS, **options)
        with pytest.raises(UsageError, match=f"SelfAttention cannot be converted: {reason}"):
            convert_kv_heads(module, 2, how="svd")
        assert module.num_kv_heads == NUM_HEADS


def test_gradients_are_wanted_as_before() -> None:
    module = SelfAttention(EMBED_DIM, NUM_HEADS).half()
    module.k_proj.requires_grad_(False)
    convert_kv_heads(module, 2, how="svd")
    assert module.q_proj.weight.requires_grad
    assert not module.k_proj.weight.requires_grad
    assert all(parameter.dtype is torch.float16 for parameter in module.parameters())
