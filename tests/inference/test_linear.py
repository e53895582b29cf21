"""The product forms: equal to the ordinary Linear to rounding, and out of the way of everything else."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from mmattn.errors import UsageError
from mmattn.inference.linear import FastHead, FastLinear, FastProduct, chosen_forms, copied_bytes, use_fast_products
from mmattn.inference.quantized import Int8Linear, quantize_linears
from mmattn.nn import SelfAttention, TransformerLayer
from mmattn.nn.vocabulary_head import VocabularyHead


def case(rows: int, out_features: int, has_bias: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, 1, 53, generator=generator)
    weight = torch.randn(out_features, 53, generator=generator)
    return x, weight, torch.randn(out_features, generator=generator) if has_bias else None


@pytest.mark.parametrize("rows", [1, 2, 7, 67])
@pytest.mark.parametrize("out_features", [97, 16 * 17])
@pytest.mark.parametrize("has_bias", [True, False])
def test_every_form_is_no_less_exact_than_the_ordinary_one(rows, out_features, has_bias):
    x, weight, bias = case(rows, out_features, has_bias)
    exact = nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    ordinary = nn.functional.linear(x, weight, bias)
    product = FastProduct()
    product.hold(weight, bias)
    with torch.no_grad():
        for name in product.candidates(rows):
            ours = product.form(name)(x)
            assert ours.shape == ordinary.shape, name
            assert (ours - exact).abs().max() <= 2 * (ordinary - exact).abs().max() + 1e-5, name


@pytest.mark.parametrize("rows", [0, 1, 5, 5000])
def test_the_chosen_form(rows):
    x, weight, bias = case(rows, 97, True)
    with torch.no_grad():
        assert torch.allclose(FastProduct()(x, weight, bias), nn.functional.linear(x, weight, bias), atol=1e-4)
    if rows == 5:
        assert (97, 53, 8) in chosen_forms()


@pytest.mark.parametrize("batch", [1, 3])
def test_a_view_of_a_longer_tensor(batch):
    x = torch.randn(batch, 5, 53)[:, -1]
    weight = torch.randn(94, 53)
    product = FastProduct()
    product.hold(weight, None)
    with torch.no_grad():
        for name in product.candidates(batch):
            assert torch.allclose(product.form(name)(x), x @ weight.t(), atol=1e-4), name


def test_a_changed_weight_is_seen():
    layer = nn.Sequential(nn.Linear(11, 13)).eval()
    use_fast_products(layer)
    x = torch.randn(3, 11)
    with torch.no_grad():
        layer(x)
        layer[0].weight.add_(1.0)
        assert torch.allclose(layer(x), nn.functional.linear(x, layer[0].weight, layer[0].bias), atol=1e-5)
        layer[0].weight = nn.Parameter(torch.randn(13, 11))
        assert torch.allclose(layer(x), nn.functional.linear(x, layer[0].weight, layer[0].bias), atol=1e-5)


def test_with_gradients_it_is_the_ordinary_linear():
    layer = nn.Linear(11, 13)
    faster = copy.deepcopy(layer)
    use_fast_products(faster)
    x = torch.randn(3, 11)
    assert torch.equal(layer(x), faster(x))
    layer(x).square().sum().backward()
    faster(x).square().sum().backward()
    assert torch.equal(layer.weight.grad, faster.weight.grad)


def test_conversion_keeps_names_and_leaves_subclasses_alone():
    class Adapted(nn.Linear):
        pass

    head = VocabularyHead(8, 31, transform="gelu")
    attention = SelfAttention(12, 3)
    network = nn.ModuleDict(
        {"plain": nn.Linear(3, 5), "adapted": Adapted(3, 5), "head": head, "attention": attention}
    ).eval()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    hidden, words, x = torch.randn(3, 8), torch.randn(31, 8), torch.randn(2, 7, 12)
    with torch.no_grad():
        expected, attended = head(hidden, words), attention(x)
        use_fast_products(network)
        assert torch.allclose(head(hidden, words), expected, atol=1e-5)
        assert torch.allclose(attention(x), attended, atol=1e-5)
    assert [type(network[name]) for name in ("plain", "adapted", "head")] == [FastLinear, Adapted, FastHead]
    assert copied_bytes(network) >= 0
    after = network.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    copy.deepcopy(network)


def test_int8_is_near_and_for_inference_only():
    torch.manual_seed(0)
    parts = {"plain": nn.Linear(67, 31), "head": VocabularyHead(67, 97), "attention": SelfAttention(66, 3)}
    network = nn.ModuleDict(parts).eval()
    x, words, rows = torch.randn(5, 67), torch.randn(97, 67), torch.randn(2, 7, 66)
    with torch.no_grad():
        expected = [network["plain"](x), network["head"](x, words), network["attention"](rows)]
        quantize_linears(network)
        found = [network["plain"](x), network["head"](x, words), network["attention"](rows)]
    assert isinstance(network["plain"], Int8Linear)
    for ours, exact in zip(found, expected, strict=True):
        assert (ours - exact).norm() < 0.05 * exact.norm()
    with pytest.raises(UsageError, match="a quantised network is for inference only"):
        network.train()


def test_a_network_made_in_inference_mode():
    with torch.inference_mode():
        layer = TransformerLayer(32, 2, 64, is_causal=True).eval()
        x = torch.randn(1, 1, 32)
        expected = layer(x)
        use_fast_products(layer)
        torch.testing.assert_close(layer(x), expected)
