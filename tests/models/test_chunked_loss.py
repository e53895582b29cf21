"""The chunked vocabulary product and cross-entropy, held to torch's own in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mmattn.errors import UsageError
from mmattn.models import linear_cross_entropy as module
from mmattn.models.linear_cross_entropy import linear_cross_entropy, row_chunks
from mmattn.models.scoring import score_labels
from mmattn.nn.vocabulary_head import VocabularyHead
from tests.compiled_functions import check_compiled_functions
from tests.tolerance import check_within

ROWS, CHANNELS, VOCAB = 23, 11, 37


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setitem(module.CHUNK_BYTES, "cpu", 5 * VOCAB * 8)


def _inputs(dtype=torch.float64, *, rows=ROWS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden, weight, bias = (
        torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in ((rows, CHANNELS), (VOCAB, CHANNELS), (VOCAB,))
    )
    return hidden, weight, bias, torch.randint(VOCAB, (rows,), generator=generator)


def _stock(hidden, weight, bias, targets, smoothing=0.0):
    logits = F.linear(hidden, weight, bias).to(torch.promote_types(hidden.dtype, torch.float32))
    return F.cross_entropy(logits, targets, reduction="sum", label_smoothing=smoothing)


def test_chunks_cover_every_row_once():
    assert [(rows.start, rows.stop) for rows in row_chunks(23, VOCAB, "cpu", 8)] == [
        (0, 5),
        (5, 10),
        (10, 15),
        (15, 20),
        (20, 23),
    ]
    assert list(row_chunks(0, VOCAB, "cpu")) == []
    assert len(list(row_chunks(3, 10**9, "cpu"))) == 3


def test_a_fixed_token_gets_no_gradient_and_the_others_theirs():
    gradients = []
    for fixed in (None, 3):
        hidden, weight, bias, targets = _inputs()
        linear_cross_entropy(hidden, weight, bias, targets, fixed_token=fixed).backward()
        gradients.append((hidden.grad, weight.grad, bias.grad))
    (free_hidden, free_weight, free_bias), (hidden_grad, weight_grad, bias_grad) = gradients
    assert free_weight[3].any()
    assert not weight_grad[3].any()
    others = torch.arange(VOCAB) != 3
    assert torch.equal(weight_grad[others], free_weight[others])
    assert torch.equal(hidden_grad, free_hidden)
    assert torch.equal(bias_grad, free_bias)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("has_bias", [True, False])
def test_loss_and_gradients_are_those_of_all_logits_at_once(smoothing, has_bias):
    hidden, weight, bias, targets = _inputs()
    inputs = (hidden, weight, bias) if has_bias else (hidden, weight)
    expected = _stock(hidden, weight, bias if has_bias else None, targets, smoothing)
    wanted = torch.autograd.grad(expected * 0.7, inputs)
    loss = linear_cross_entropy(hidden, weight, bias if has_bias else None, targets, label_smoothing=smoothing)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    for gradient, reference in zip(torch.autograd.grad(loss * 0.7, inputs), wanted, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-10, atol=1e-12)


def test_gradcheck():
    # Of the hidden states: the gradients of the weights are given away once, and gradcheck asks again and again.
    hidden, weight, bias, targets = _inputs(rows=7)
    weight, bias = weight.detach(), bias.detach()
    assert torch.autograd.gradcheck(
        lambda x: linear_cross_entropy(x, weight, bias, targets, label_smoothing=0.1), (hidden,)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_as_near_to_float64_as_stock(dtype):
    hidden, weight, bias, targets = _inputs(dtype)
    references = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight, bias)]
    loss = _stock(*references, targets)
    want = [loss, *torch.autograd.grad(loss, references)]
    stock = _stock(hidden, weight, bias, targets)
    theirs = [stock, *torch.autograd.grad(stock, (hidden, weight, bias))]
    ours = linear_cross_entropy(hidden, weight, bias, targets)
    mine = [ours, *torch.autograd.grad(ours, (hidden, weight, bias))]
    for name, one, other, reference in zip(("loss", "hidden", "weight", "bias"), mine, theirs, want, strict=True):
        assert one.dtype is other.dtype
        got, eager, exactly = (tensor.detach().reshape(-1) for tensor in (one, other, reference))
        check_within(got, eager, exactly, factor=2 if name == "loss" else 3, what=name)


def test_under_autocast_products_are_in_its_dtype_and_gradients_in_float32():
    hidden, weight, bias, targets = _inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        stock = F.cross_entropy(F.linear(hidden, weight, bias).float(), targets, reduction="sum")
        loss = linear_cross_entropy(hidden, weight, bias, targets)
    assert loss.dtype is torch.float32
    exact = linear_cross_entropy(hidden, weight, bias, targets)
    assert abs(loss - exact) > 1e-5  # not float32's
    torch.testing.assert_close(loss, stock, rtol=1e-4, atol=1e-4)
    gradients = torch.autograd.grad(loss, (hidden, weight, bias))
    for gradient, reference in zip(gradients, torch.autograd.grad(stock, (hidden, weight, bias)), strict=True):
        assert gradient.dtype is torch.float32
        torch.testing.assert_close(gradient, reference, rtol=2e-2, atol=2e-2)


def test_frozen_parts_get_no_gradient_and_take_no_memory():
    hidden, weight, bias, targets = _inputs()
    for frozen in (weight, bias):
        frozen.requires_grad_(False)
    loss = linear_cross_entropy(hidden, weight, bias, targets)
    assert loss.grad_fn.weight_grads == [None, None]
    loss.backward()
    assert weight.grad is None
    expected = torch.autograd.grad(_stock(hidden, weight, bias, targets), hidden)[0]
    torch.testing.assert_close(hidden.grad, expected, rtol=1e-10, atol=1e-12)
    fixed = linear_cross_entropy(hidden.detach(), weight.requires_grad_(), None, targets)
    fixed.backward()
    torch.testing.assert_close(
        weight.grad, torch.autograd.grad(_stock(hidden, weight, None, targets), weight)[0], rtol=1e-10, atol=1e-12
    )


def test_a_second_backward_is_refused():
    hidden, weight, _, targets = _inputs()
    loss = linear_cross_entropy(hidden, weight, None, targets)
    loss.backward(retain_graph=True)
    with pytest.raises(UsageError, match=r"second backward pass; .*run the forward pass again"):
        loss.backward()


def test_large_logits_stay_finite():
    hidden, weight, bias, targets = _inputs(torch.float32)
    loss = linear_cross_entropy(hidden * 1e4, weight, bias, targets)
    loss.backward()
    torch.testing.assert_close(loss, _stock(hidden * 1e4, weight, bias, targets))
    assert weight.grad.isfinite().all()


def test_nothing_to_score():
    hidden, weight, bias, targets = _inputs(rows=0)
    loss = linear_cross_entropy(hidden, weight, bias, targets)
    loss.backward()
    assert loss.item() == 0
    assert not weight.grad.any()


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_scored_labels_are_the_same_with_and_without_gradients(is_tied, smoothing):
    torch.manual_seed(3)
    head = VocabularyHead(CHANNELS, VOCAB, is_tied=is_tied, transform="gelu", weight_std=0.5).double()
    torch.nn.init.normal_(head.bias)
    words = torch.randn(VOCAB, CHANNELS, dtype=torch.float64, requires_grad=True)
    hidden = torch.randn(3, 7, CHANNELS, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(VOCAB, (3, 7))
    labels[1, 2:] = labels[2] = -100
    expected = F.cross_entropy(
        head(hidden, words).flatten(0, 1), labels.flatten(), reduction="sum", label_smoothing=smoothing
    )
    output = score_labels(hidden, labels, head, words, label_smoothing=smoothing)
    with torch.no_grad():
        quiet = score_labels(hidden, labels, head, words, label_smoothing=smoothing)
    assert output.logits is None
    assert torch.equal(output.targets, labels[labels != -100])
    assert int(output.num_tokens) == len(output.targets) == 9
    torch.testing.assert_close(output.loss_sum, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(quiet.loss_sum, expected, rtol=1e-12, atol=1e-12)
    inputs = [hidden, head.bias, head.dense.weight, words if is_tied else head.weight]
    wanted = torch.autograd.grad(expected, inputs)
    for gradient, reference in zip(torch.autograd.grad(output.loss_sum, inputs), wanted, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("chunk_bytes", [5 * VOCAB * 8, 2**20])
def test_gradients_of_compiled_code(monkeypatch, chunk_bytes):
    monkeypatch.setitem(module.CHUNK_BYTES, "cpu", chunk_bytes)
    hidden, weight, bias, targets = _inputs()
    check_compiled_functions(lambda *tensors: linear_cross_entropy(*tensors, targets), hidden, weight, bias)
