"""The product forms: equal to the ordinary Linear to rounding, and out of the way of everything else."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from mmattn.inference.linear import FewRowsHead, FewRowsLinear, _blocks, few_rows_linear, use_few_rows_products
from mmattn.nn.vocabulary_head import VocabularyHead


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 8, 9, 31])
@pytest.mark.parametrize("out_features", [97, 2 * 3 * 17])
@pytest.mark.parametrize("has_bias", [True, False])
def test_no_less_exact_than_the_ordinary_form(rows, out_features, has_bias):
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, 1, 53, generator=generator)
    weight = torch.randn(out_features, 53, generator=generator)
    bias = torch.randn(out_features, generator=generator) if has_bias else None
    exact = nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    with torch.no_grad():
        ours = few_rows_linear(x, weight, bias)
    ordinary = nn.functional.linear(x, weight, bias)
    assert ours.shape == ordinary.shape
    assert ours.is_contiguous()
    if rows:
        assert (ours - exact).abs().max() <= 2 * (ordinary - exact).abs().max() + 1e-6


@pytest.mark.parametrize(
    ("out_features", "threads", "blocks"),
    [(97, 2, 1), (96, 1, 1), (96, 2, 2), (30524, 2, 2), (30524, 8, 13), (15, 2, 3)],
)
def test_into_how_many_blocks_one_row_splits_a_weight(out_features, threads, blocks):
    weight = torch.empty(out_features, 3, device="meta")
    assert _blocks(weight, threads) == blocks
    assert _blocks(weight.t().contiguous().t(), threads) == 1


@pytest.mark.parametrize("batch", [1, 3])
def test_a_view_of_a_longer_tensor(batch):
    x = torch.randn(batch, 5, 53)[:, -1]
    weight = torch.randn(94, 53)
    with torch.no_grad():
        assert torch.allclose(few_rows_linear(x, weight, None), x @ weight.t(), atol=1e-5)


def test_with_gradients_it_is_the_ordinary_linear():
    layer = nn.Linear(11, 13)
    faster = copy.deepcopy(layer)
    use_few_rows_products(faster)
    x = torch.randn(3, 11)
    assert torch.equal(layer(x), faster(x))
    layer(x).square().sum().backward()
    faster(x).square().sum().backward()
    assert torch.equal(layer.weight.grad, faster.weight.grad)


def test_conversion_keeps_names_and_leaves_subclasses_alone():
    class Adapted(nn.Linear):
        pass

    head = VocabularyHead(8, 31, transform="gelu")
    network = nn.ModuleDict({"plain": nn.Linear(3, 5), "adapted": Adapted(3, 5), "head": head})
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    hidden, words = torch.randn(3, 8), torch.randn(31, 8)
    with torch.no_grad():
        expected = head(hidden, words)
        use_few_rows_products(network)
        assert torch.allclose(head(hidden, words), expected, atol=1e-5)
    if torch.backends.mkl.is_available():
        assert [type(network[name]) for name in ("plain", "adapted", "head")] == [FewRowsLinear, Adapted, FewRowsHead]
    after = network.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert isinstance(network["plain"], nn.Linear)
    copy.deepcopy(network)
