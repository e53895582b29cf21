from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from mmattn.errors import UsageError
from mmattn.nn import CrossAttention, RotaryEmbedding, SelfAttention, TransformerLayer, convert_kv_heads, fuse
from mmattn.nn.kv_heads import KVHeadSource
from mmattn.nn.projected_attention import ProjectedAttention

EMBED_DIM, CONTEXT_DIM, NUM_HEADS, HEAD_DIM = 24, 17, 6, 4


def equal_heads(module: nn.Module, num_kv_heads: int) -> nn.Module:
    """Make the key and value heads that will be pooled together equal."""
    with torch.no_grad():
        for child in module.modules():
            if isinstance(child, ProjectedAttention):
                for parameter in (*child.k_proj.parameters(), *child.v_proj.parameters()):
                    heads = parameter.view(num_kv_heads, -1, HEAD_DIM, *parameter.shape[1:])
                    heads.copy_(heads[:, :1].expand_as(heads).clone())
    return module


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor]:
    torch.manual_seed(30)
    return torch.randn(4, 5, EMBED_DIM).double(), torch.randn(2, 7, CONTEXT_DIM).double()


@pytest.mark.parametrize("num_kv_heads", [1, 2, 3, 6])
@pytest.mark.parametrize("options", [{}, {"qk_norm": "rms", "rotary": RotaryEmbedding(HEAD_DIM), "is_causal": True}])
@torch.no_grad()
def test_self_attention_is_unchanged_by_equal_heads(inputs, num_kv_heads: int, options: dict) -> None:
    torch.manual_seed(31)
    module = equal_heads(SelfAttention(EMBED_DIM, NUM_HEADS, **options).double(), num_kv_heads)
    expected = module(inputs[0])
    assert convert_kv_heads(module, num_kv_heads) is module
    assert module.k_proj.weight.shape == (num_kv_heads * HEAD_DIM, EMBED_DIM)
    assert module.num_kv_heads == num_kv_heads
    assert module.k_proj.out_features == num_kv_heads * HEAD_DIM
    torch.testing.assert_close(module(inputs[0]), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("num_kv_heads", [1, 2])
@torch.no_grad()
def test_cross_attention_is_unchanged_by_equal_heads(inputs, num_kv_heads: int) -> None:
    torch.manual_seed(32)
    module = CrossAttention(EMBED_DIM, NUM_HEADS, context_dim=CONTEXT_DIM, bias=False).double()
    expected = equal_heads(module, num_kv_heads)(*inputs)
    convert_kv_heads(module, num_kv_heads)
    assert module.project_context(inputs[1]).key.shape == (2, num_kv_heads, 7, HEAD_DIM)
    torch.testing.assert_close(module(*inputs), expected, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_whole_layers_step_by_step(inputs) -> None:
    x, context = inputs
    torch.manual_seed(33)
    layers = nn.ModuleList(
        TransformerLayer(EMBED_DIM, NUM_HEADS, 13, has_cross_attention=True, context_dim=CONTEXT_DIM, is_causal=True)
        for _ in range(2)
    ).double()
    equal_heads(layers, 3)
    expected = layers[1](layers[0](x, context=context), context=context)
    convert_kv_heads(layers, 3)
    convert_kv_heads(equal_heads(layers, 3), 3)  # a conversion to the number it has changes nothing
    torch.testing.assert_close(
        layers[1](layers[0](x, context=context), context=context), expected, rtol=1e-11, atol=1e-11
    )


@torch.no_grad()
def test_mean_pooling_by_hand() -> None:
    module = SelfAttention(2, 4, head_dim=1)
    module.k_proj.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 6.0], [10.0, 20.0], [20.0, 50.0]]))
    module.k_proj.bias.copy_(torch.tensor([1.0, 2.0, -4.0, 8.0]))
    module.v_proj.weight.copy_(torch.tensor([[0.0, 8.0], [4.0, 0.0], [2.0, 2.0], [4.0, 6.0]]))
    queries = module.q_proj.weight.clone()
    convert_kv_heads(module, 2)
    assert module.k_proj.weight.tolist() == [[2.0, 4.0], [15.0, 35.0]]
    assert module.k_proj.bias.tolist() == [1.5, 2.0]
    assert module.v_proj.weight.tolist() == [[2.0, 4.0], [3.0, 4.0]]
    assert torch.equal(module.q_proj.weight, queries)


@torch.no_grad()
def test_the_first_head_of_a_group_by_hand() -> None:
    module = SelfAttention(2, 4, head_dim=1)
    module.v_proj.weight.copy_(torch.tensor([[0.0, 8.0], [4.0, 0.0], [2.0, 3.0], [4.0, 6.0]]))
    module.v_proj.bias.copy_(torch.tensor([1.0, 2.0, -4.0, 8.0]))
    before = module.v_proj.weight
    convert_kv_heads(module, 2, how="first")
    assert module.v_proj.weight.tolist() == [[0.0, 8.0], [2.0, 3.0]]
    assert module.v_proj.bias.tolist() == [1.0, -4.0]
    module.v_proj.weight.zero_()
    assert before.any()


@torch.no_grad()
def test_random_heads_are_new_and_seeded() -> None:
    def converted(seed: int) -> SelfAttention:
        torch.manual_seed(37)
        module = SelfAttention(EMBED_DIM, NUM_HEADS)
        torch.manual_seed(seed)
        return convert_kv_heads(module, 2, how="random")

    one, again, other = converted(1), converted(1), converted(2)
    assert torch.equal(one.k_proj.weight, again.k_proj.weight)
    assert not torch.equal(one.k_proj.weight, other.k_proj.weight)
    assert not torch.equal(one.k_proj.weight, one.v_proj.weight)
    bound = (6 / (2 * HEAD_DIM + EMBED_DIM)) ** 0.5  # Xavier's
    assert 0.8 * bound < one.k_proj.weight.abs().max() <= bound
    assert not one.k_proj.bias.any()
    assert one(torch.randn(2, 5, EMBED_DIM)).shape == (2, 5, EMBED_DIM)


@torch.no_grad()
def test_grouped_heads_are_pooled_further() -> None:
    torch.manual_seed(34)
    once = SelfAttention(EMBED_DIM, NUM_HEADS, bias=False).double()
    twice = copy.deepcopy(once)
    convert_kv_heads(once, 1)
    convert_kv_heads(convert_kv_heads(twice, 3), 1)
    torch.testing.assert_close(twice.k_proj.weight, once.k_proj.weight, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_fused_modules_stay_fused_and_frozen_stay_frozen(inputs) -> None:
    torch.manual_seed(35)
    module = equal_heads(SelfAttention(EMBED_DIM, NUM_HEADS).double(), 2).eval().requires_grad_(False)
    expected = module(inputs[0])
    convert_kv_heads(fuse(module), 2)
    assert module.is_fused
    assert not any(parameter.requires_grad for parameter in module.parameters())
    torch.testing.assert_close(module(inputs[0]), expected, rtol=1e-11, atol=1e-11)


@torch.no_grad()
def test_narrow_weights_are_pooled_in_float32() -> None:
    torch.manual_seed(36)
    module = SelfAttention(EMBED_DIM, NUM_HEADS).bfloat16()
    expected = module.k_proj.weight.float().view(2, 3, HEAD_DIM, EMBED_DIM).mean(1).flatten(0, 1).bfloat16()
    assert torch.equal(convert_kv_heads(module, 2).k_proj.weight, expected)


@pytest.mark.parametrize("how", ["mean", "first", "random"])
def test_shared_weights_stay_shared(how: KVHeadSource) -> None:
    layers = nn.ModuleList([SelfAttention(EMBED_DIM, NUM_HEADS) for _ in range(3)])
    layers[1].k_proj.weight = layers[0].k_proj.weight
    layers[2].k_proj = layers[0].k_proj
    convert_kv_heads(layers, 2, how=how)
    assert layers[1].k_proj.weight is layers[0].k_proj.weight is layers[2].k_proj.weight
    assert layers[1].k_proj.bias is not layers[0].k_proj.bias
    assert layers[1].v_proj.weight is not layers[0].v_proj.weight
    assert layers[2].k_proj.weight.shape == (2 * layers[0].head_dim, EMBED_DIM)
    for layer in layers:
        assert layer(torch.zeros(1, 2, EMBED_DIM)).shape == (1, 2, EMBED_DIM)


def test_errors_change_nothing() -> None:
    with pytest.raises(UsageError, match=r"convert_kv_heads: Linear holds no attention of mmattn\.nn"):
        convert_kv_heads(nn.Linear(2, 2), 1)
    with pytest.raises(UsageError, match="how='last' is unknown: use mean, svd, first, random"):
        convert_kv_heads(SelfAttention(EMBED_DIM, NUM_HEADS), 2, how="last")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="SelfAttention has 6 key/value heads, not divisible into 4"):
        convert_kv_heads(SelfAttention(EMBED_DIM, NUM_HEADS), 4)
    layers = nn.ModuleList([SelfAttention(EMBED_DIM, NUM_HEADS), SelfAttention(EMBED_DIM, NUM_HEADS, num_kv_heads=1)])
    with pytest.raises(UsageError, match="1 has 1 key/value heads, not divisible into 2"):
        convert_kv_heads(layers, 2)
    assert layers[0].num_kv_heads == NUM_HEADS
    twins = nn.ModuleList([SelfAttention(EMBED_DIM, NUM_HEADS) for _ in range(2)])
    twins[1].q_proj.weight = twins[0].q_proj.weight
    with pytest.raises(UsageError, match=r"1\.q_proj\.weight is 0\.q_proj\.weight too, and how='svd' needs weights"):
        convert_kv_heads(twins, 2, how="svd")
    assert twins[0].num_kv_heads == NUM_HEADS
    module = SelfAttention(EMBED_DIM, NUM_HEADS)
    module.v_proj = nn.Sequential(module.v_proj)  # type: ignore[assignment]
    with pytest.raises(UsageError, match=r"v_proj is a torch\.nn\.modules\.container\.Sequential, not a plain"):
        convert_kv_heads(module, 2)
