"""The blocks under other names than their own: the same numbers, state dicts, packing and adapters."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from mmattn.nn import CrossAttention, FeedForward, SelfAttention, TransformerLayer, convert_kv_heads, fuse, unfuse
from mmattn.nn.names import DIFFUSERS_ATTENTION, DIFFUSERS_FEED_FORWARD, DIFFUSERS_LAYER, find, place

SIZES = {"embed_dim": 30, "num_heads": 5, "ffn_dim": 37, "has_cross_attention": True, "context_dim": 22}
OURS_TO_DIFFUSERS = {
    "self_attn_norm": "norm1",
    "self_attn": "attn1",
    "cross_attn_norm": "norm2",
    "cross_attn": "attn2",
    "ffn_norm": "norm3",
    "q_proj": "to_q",
    "k_proj": "to_k",
    "v_proj": "to_v",
    "out_proj": "to_out.0",
}


def renamed(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A layer's state under diffusers' names: the feed-forward's first two Linears joined, the value's half first."""
    other = {}
    for name, tensor in state.items():
        *parts, kind = name.split(".")
        if parts[0] != "ffn":
            other[".".join([*(OURS_TO_DIFFUSERS[part] for part in parts), kind])] = tensor
    for kind in ("weight", "bias"):
        other[f"ff.net.0.proj.{kind}"] = torch.cat([state[f"ffn.{part}_proj.{kind}"] for part in ("up", "gate")])
        other[f"ff.net.2.{kind}"] = state[f"ffn.down_proj.{kind}"]
    return other


@pytest.fixture
def layers() -> tuple[TransformerLayer, TransformerLayer]:
    """The same weights under our names and under diffusers'."""
    torch.manual_seed(0)
    ours = TransformerLayer(**SIZES, activation="geglu").eval()
    other = TransformerLayer(**SIZES, activation="geglu", names=DIFFUSERS_LAYER).eval()
    other.load_state_dict(renamed(ours.state_dict()), strict=True)
    return ours, other


def run(layer: TransformerLayer) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    x, context = torch.randn(2, 11, 30, generator=generator), torch.randn(2, 7, 22, generator=generator)
    return layer(x, context=context)


def test_the_same_output_under_other_names(layers: tuple[TransformerLayer, TransformerLayer]) -> None:
    ours, other = layers
    torch.testing.assert_close(run(other), run(ours))


def test_the_state_is_diffusers(layers: tuple[TransformerLayer, TransformerLayer]) -> None:
    from diffusers.models.attention import BasicTransformerBlock

    block = BasicTransformerBlock(30, 5, 6, cross_attention_dim=22, attention_bias=True, ff_inner_dim=37)
    shapes = {name: tensor.shape for name, tensor in block.state_dict().items()}
    assert {name: tensor.shape for name, tensor in layers[1].state_dict().items()} == shapes
    block.eval().load_state_dict(layers[1].state_dict())
    generator = torch.Generator().manual_seed(1)
    x, context = torch.randn(2, 11, 30, generator=generator), torch.randn(2, 7, 22, generator=generator)
    torch.testing.assert_close(run(layers[1]), block(x, encoder_hidden_states=context))


def test_parts_are_read_under_our_names(layers: tuple[TransformerLayer, TransformerLayer]) -> None:
    layer = layers[1]
    assert layer.self_attn is layer.get_submodule("attn1")
    assert layer.cross_attn is layer.get_submodule("attn2")
    assert layer.ffn_norm is layer.get_submodule("norm3")
    attention = layer.self_attn
    assert attention is not None
    assert (attention.q_proj, attention.out_proj) == (attention.to_q, attention.to_out[0])
    assert attention.to_out(torch.ones(1, 30)).shape == (1, 30)
    assert layer.ffn.up_proj is layer.ff.net[0].proj
    assert layer.ffn.down_proj is layer.ff.net[2]
    assert layer.ffn.gate_proj is None


def test_without_a_part() -> None:
    layer = TransformerLayer(30, 5, 37, names=DIFFUSERS_LAYER, has_self_attention=False)
    assert layer.self_attn is None
    assert layer.cross_attn is None
    assert layer.self_attn_norm is None


def test_packing_under_other_names(layers: tuple[TransformerLayer, TransformerLayer]) -> None:
    layer = layers[1]
    expected, names = run(layer), list(layer.state_dict())
    with torch.no_grad():
        fuse(layer)
        assert layer.attn1.packed_names == ("to_q", "to_k", "to_v")
        torch.testing.assert_close(run(layer), expected)
        assert list(layer.state_dict()) == names
        layer.attn1.to_v.weight *= 2  # a packed weight is the Linear's own
        changed = run(layer)
        assert (changed - expected).abs().max() > 1e-3
        torch.testing.assert_close(run(unfuse(layer)), changed)


@pytest.mark.parametrize("target", ["to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2"])
def test_adapters_are_called(target: str, layers: tuple[TransformerLayer, TransformerLayer]) -> None:
    layer = fuse(layers[1])
    before = run(layer)
    inject_adapter_in_model(LoraConfig(r=2, init_lora_weights=False, target_modules=[target]), layer)
    assert (run(layer) - before).abs().max() > 1e-4


def test_copies_and_pickles(layers: tuple[TransformerLayer, TransformerLayer]) -> None:
    expected = run(layers[1])
    for layer in (copy.deepcopy(layers[1]), pickle.loads(pickle.dumps(layers[1]))):
        assert torch.equal(run(layer), expected)
        layer.attn2.to_v.weight.data.zero_()
        assert not torch.equal(run(layer), expected)


@pytest.mark.parametrize("how", ["mean", "svd"])
def test_fewer_kv_heads_under_other_names(how: str) -> None:
    torch.manual_seed(0)
    ours = CrossAttention(24, 6, context_dim=10)
    other = CrossAttention(24, 6, context_dim=10, names=DIFFUSERS_ATTENTION)
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        getattr(other, name).load_state_dict(getattr(ours, name).state_dict())
    x, context = torch.randn(2, 5, 24), torch.randn(2, 7, 10)
    for module in (ours, other):
        convert_kv_heads(module, 3, how=how)  # type: ignore[arg-type]
    torch.testing.assert_close(other(x, context), ours(x, context))
    assert other.to_k.weight.shape == (12, 10)


def test_feed_forwards_under_other_names() -> None:
    torch.manual_seed(0)
    plain = FeedForward(12, 17, activation="silu", names=DIFFUSERS_FEED_FORWARD)
    assert plain.net[0].proj.weight.shape == (17, 12)
    x = torch.randn(3, 12)
    torch.testing.assert_close(plain(x), plain.net[2](nn.functional.silu(plain.net[0].proj(x))))
    gated = FeedForward(12, 17, activation="swiglu", names=DIFFUSERS_FEED_FORWARD)
    value, gate = gated.net[0].proj(x).chunk(2, dim=-1)
    torch.testing.assert_close(gated(x), gated.net[2](value * nn.functional.silu(gate)))


def test_biases_of_the_queries_keys_and_values_alone() -> None:
    layer = TransformerLayer(**SIZES, attention_bias=False)
    assert [
        name for name, module in layer.named_modules() if isinstance(module, nn.Linear) and module.bias is None
    ] == [f"{attention}.{part}_proj" for attention in ("self_attn", "cross_attn") for part in "qkv"]


def test_dropout_of_the_feed_forward_alone() -> None:
    layer = TransformerLayer(12, 3, 17, dropout_p=0.0, ffn_dropout_p=1.0)
    attended = TransformerLayer(12, 3, 17, dropout_p=1.0, ffn_dropout_p=0.0)
    x = torch.randn(2, 5, 12)
    torch.testing.assert_close(layer(x), x + layer.self_attn(layer.self_attn_norm(x)))
    torch.testing.assert_close(attended(x), x + attended.ffn(attended.ffn_norm(x)))


def test_a_float_mask_of_the_context(layers: tuple[TransformerLayer, TransformerLayer]) -> None:
    layer = layers[0]
    x, context = torch.randn(2, 5, 30), torch.randn(2, 7, 22)
    bias = torch.zeros(2, 1, 7).masked_fill(torch.arange(7) > 3, float("-inf"))
    torch.testing.assert_close(layer(x, context=context, context_attn_mask=bias), layer(x, context=context[:, :4]))


def test_places_are_found_again() -> None:
    owner, part = nn.Module(), nn.Linear(2, 3)
    place(owner, ("body", "2", "proj"), part)
    assert find(owner, ("body", "2", "proj")) is part
    assert list(owner.state_dict()) == ["body.2.proj.weight", "body.2.proj.bias"]
    assert isinstance(SelfAttention(6, 2).out_proj, nn.Linear)
