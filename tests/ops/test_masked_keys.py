"""What is masked has no influence whatever it holds, and a row without keys gives exactly nothing."""

import pytest
import torch

from mmattn.ops.attention import attention
from mmattn.ops.backends import sdpa
from tests.ops.cases import (
    ATTN_MASKS,
    KEY_MASKS,
    SHAPES,
    allowed_everywhere,
    generator_for,
    make_attn_mask,
    make_inputs,
    make_key_mask,
    used_by_anyone,
)

CASES = [(a, k) for a in ATTN_MASKS for k in KEY_MASKS if (a, k) != ("none", "none")]


@pytest.fixture(params=["eager", "sdpa", "sdpa without looking"])
def backend(request, monkeypatch):
    """The backends, and sdpa in the form for devices whose masks it may not look at, run on a CPU."""
    if request.param == "sdpa without looking":
        monkeypatch.setattr(sdpa, "_may_look", lambda tensor: False)
    return request.param.split()[0]


def masked_call(backend, shape, attn_kind, key_kind, is_causal, poison, dropout_p=0.0, dtype=torch.float32):
    generator = generator_for(SHAPES.index(shape), CASES.index((attn_kind, key_kind)))
    query, key, value = make_inputs(shape, dtype, generator)
    attn_mask = make_attn_mask(attn_kind, shape, generator)
    if attn_mask is not None and attn_mask.is_floating_point():
        attn_mask = attn_mask.to(dtype)
    key_mask = make_key_mask(key_kind, shape, generator)
    allowed = allowed_everywhere(shape, attn_mask, key_mask, is_causal)
    unused = ~used_by_anyone(shape, allowed)
    for tensor in (key, value):
        tensor.masked_fill_(unused.unsqueeze(-1), poison)
    inputs = [tensor.requires_grad_() for tensor in (query, key, value)]
    output = attention(
        *inputs, attn_mask=attn_mask, key_mask=key_mask, is_causal=is_causal, dropout_p=dropout_p, backend=backend
    )
    output.square().sum().backward()
    return output.detach(), [tensor.grad for tensor in inputs], allowed, unused


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[2], SHAPES[3], SHAPES[4]], ids=str)
def test_poison_under_the_mask(backend, shape, is_causal):
    # Every other case, the others with the other value of is_causal and the next shape.
    shift = (is_causal + SHAPES.index(shape)) % 2
    for number, (attn_kind, key_kind) in list(enumerate(CASES))[shift::2]:
        poison = (float("nan"), float("inf"), 3e38)[number % 3]
        where = f"attn {attn_kind} key {key_kind} poison {poison}"
        clean, clean_grads, allowed, unused = masked_call(backend, shape, attn_kind, key_kind, is_causal, 0.0)
        output, grads, _, _ = masked_call(backend, shape, attn_kind, key_kind, is_causal, poison)
        for got, expected in zip((output, *grads), (clean, *clean_grads), strict=True):
            assert got.isfinite().all(), where
            # Not bit for bit: a copy with zeros has other strides, and products may add up in another order.
            torch.testing.assert_close(got, expected, msg=lambda text, where=where: f"{where}: {text}")
        empty = ~allowed.any(-1)
        assert not clean[empty].any(), where
        assert not clean_grads[0][empty].any(), where
        for grad in clean_grads[1:]:
            assert not grad[unused].any(), where


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_poison_in_other_dtypes(backend, dtype):
    for attn_kind, key_kind in CASES[::3]:
        arguments = (backend, SHAPES[3], attn_kind, key_kind, True)
        clean, clean_grads, _, _ = masked_call(*arguments, 0.0, dtype=dtype)
        output, grads, _, _ = masked_call(*arguments, float("nan"), dtype=dtype)
        for got, expected in zip((output, *grads), (clean, *clean_grads), strict=True):
            torch.testing.assert_close(got, expected)


def test_empty_rows_with_dropout(backend):
    for attn_kind, key_kind in CASES[::2]:
        output, grads, allowed, _ = masked_call(
            backend, SHAPES[0], attn_kind, key_kind, True, float("nan"), dropout_p=0.4
        )
        empty = ~allowed.any(-1)
        assert output.isfinite().all()
        assert not output[empty].any()
        assert not grads[0][empty].any()
        assert all(grad.isfinite().all() for grad in grads)


def test_weights_of_empty_rows_are_zero():
    shape = SHAPES[0]
    generator = generator_for(59)
    mask = make_attn_mask("empty-rows", shape, generator)
    key_mask = make_key_mask("nothing", shape, generator)
    _, weights = attention(
        *make_inputs(shape, torch.float32, generator), attn_mask=mask, key_mask=key_mask, return_weights=True
    )
    allowed = allowed_everywhere(shape, mask, key_mask)
    assert not weights[~allowed].any()
    torch.testing.assert_close(weights.sum(-1), allowed.any(-1).float())


def test_nan_in_a_key_that_is_attended_to_is_not_hidden(backend):
    shape = SHAPES[0]
    query, key, value = make_inputs(shape, torch.float32, generator_for(61))
    value[0, 1, 3] = float("nan")
    key_mask = torch.ones(shape.batch, shape.keys, dtype=torch.bool)
    key_mask[:, -2:] = False
    output = attention(query, key, value, key_mask=key_mask, backend=backend)
    assert output[0, 1].isnan().all()
    assert output[1].isfinite().all()


def test_causal_is_aligned_at_the_end(backend):
    """Not torch's alignment: with 3 queries over 5 keys, the first query sees 3 keys and the last all 5."""
    value = torch.eye(5)[None, None]
    query, key = torch.zeros(1, 1, 3, 5), torch.zeros(1, 1, 5, 5)
    expected = torch.tensor([[1 / 3, 1 / 3, 1 / 3, 0, 0], [1 / 4, 1 / 4, 1 / 4, 1 / 4, 0], [0.2] * 5])
    torch.testing.assert_close(attention(query, key, value, is_causal=True, backend=backend)[0, 0], expected)
    # More queries than keys: the first two see nothing.
    query, key, value = torch.zeros(1, 1, 5, 3), torch.zeros(1, 1, 3, 3), torch.eye(3)[None, None]
    expected = torch.tensor([[0, 0, 0], [0, 0, 0], [1, 0, 0], [1 / 2, 1 / 2, 0], [1 / 3, 1 / 3, 1 / 3]])
    torch.testing.assert_close(attention(query, key, value, is_causal=True, backend=backend)[0, 0], expected)
