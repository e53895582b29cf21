"""Key masks whose values stay on the device: sdpa's way of masking on cards, run here on a CPU."""

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mmattn.ops.attention import attention
from mmattn.ops.backends import sdpa
from tests.ops.cases import Shape, generator_for, make_inputs, make_key_mask
from tests.tolerance import check_attention

SHAPE = Shape(3, 6, 2, 11, 13, 7)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _without_looking(monkeypatch):
    monkeypatch.setattr(sdpa, "_may_look", lambda tensor: False)
    monkeypatch.setattr(sdpa, "_NUMBERS", {})


def through_sdpa(*tensors, **arguments):
    return attention(*tensors, backend="sdpa", **arguments)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("kind", ["right", "gaps", "nothing"])
def test_within_the_tolerance(kind, dtype):
    generator = generator_for(DTYPES.index(dtype), 3)
    query, key, value = make_inputs(SHAPE, dtype, generator)
    key_mask = make_key_mask(kind, SHAPE, generator)
    key = key.masked_fill(~key_mask[:, None, :, None], float("nan"))
    got = check_attention(through_sdpa, query, key, value, key_mask=key_mask, what=kind)
    empty = ~key_mask.any(-1)
    assert empty.any() == (kind == "nothing")
    for name in ("output", "grad of query", "grad of key", "grad of value"):
        assert not got[name][empty].any()


@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.float32, 1e10), (torch.bfloat16, 1e10), (torch.float16, 100.0)], ids=str
)
def test_scores_far_below_zero(dtype, size):
    """A score that counts is never below one that does not."""
    query, key, value = (torch.ones(2, 1, 3, 13, dtype=dtype) for _ in range(3))
    query, key = query * size, -key * size
    value = torch.randn(2, 1, 3, 13, generator=generator_for(5)).to(dtype)
    key_mask = torch.tensor([[False, True, False], [False, False, False]])
    output = through_sdpa(query, key, value, key_mask=key_mask, scale=1.0)
    assert (query.double() @ key.double().mT).max() < torch.finfo(torch.float16).min
    assert torch.equal(output[0], value[0, :, 1:2].expand(1, 3, 13))
    assert not output[1].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numbers_are_made_once(dtype):
    query, key, value = make_inputs(SHAPE, dtype, generator_for(7))
    key_mask = make_key_mask("gaps", SHAPE, generator_for(7))
    with torch.inference_mode():
        through_sdpa(query, key, value, key_mask=key_mask)
    ((place, made),) = sdpa._NUMBERS.items()
    assert place == (query.device, dtype)
    assert not any(number.is_inference() for number in made)
    through_sdpa(query.requires_grad_(), key, value, key_mask=key_mask).sum().backward()
    assert sdpa._NUMBERS[place] is made


def test_fake_tensors_leave_no_numbers():
    query, key, value = make_inputs(SHAPE, torch.float32, generator_for(11))
    key_mask = make_key_mask("gaps", SHAPE, generator_for(11))
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(tensor) for tensor in (query, key, value, key_mask)]
        assert through_sdpa(*fake[:3], key_mask=fake[3]).shape == query.shape
    assert not sdpa._NUMBERS
    compiled = torch.compile(through_sdpa, fullgraph=True, backend="aot_eager")
    assert torch.equal(
        compiled(query, key, value, key_mask=key_mask), through_sdpa(query, key, value, key_mask=key_mask)
    )


def test_few_operations():
    """Two for keys and values, three for the mask; a card's processor waits for each."""
    query, key, value = make_inputs(SHAPE, torch.float32, generator_for(13))
    key_mask = make_key_mask("gaps", SHAPE, generator_for(13))
    through_sdpa(query, key, value, key_mask=key_mask)
    with torch.profiler.profile() as profile:
        through_sdpa(query, key, value, key_mask=key_mask)
    counts = {event.key: event.count for event in profile.key_averages()}
    assert (counts["aten::where"], counts["aten::any"]) == (4, 1)
    assert not {"aten::masked_fill", "aten::bitwise_not", "aten::full", "aten::new_full"} & set(counts)


def lse_of(scores):
    """As kernels of a card have it: rows are scaled for powers of two, and the largest score scaled back."""
    log2_e = torch.tensor(1.4426950408889634)
    scaled = scores.float() * log2_e
    largest = scaled.max(-1, keepdim=True).values
    return largest / log2_e + torch.exp2(scaled - largest).sum(-1, keepdim=True).log()


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_scores_of_rows_without_keys_survive_a_rounded_lse(monkeypatch, dtype):
    """Backwards take weights from the forward's log-sum-exp. Far below zero its rounding is more than exp can bear:
    what the memory-efficient kernel of CUDA made NaN of when "may not" was -1e30."""
    seen = []
    kernel = sdpa._kernel
    monkeypatch.setattr(sdpa, "_kernel", lambda *arguments: (seen.append(arguments[4]), kernel(*arguments))[1])
    query, key, value = make_inputs(SHAPE, dtype, generator_for(17))
    key_mask = make_key_mask("nothing", SHAPE, generator_for(17))
    through_sdpa(query, key, value, key_mask=key_mask)
    (mask,) = seen
    weights = torch.exp(mask.float() - lse_of(mask))
    torch.testing.assert_close(weights.sum(-1), torch.ones(SHAPE.batch, 1, 1))
    bad = torch.full((1, SHAPE.keys), -1e30, dtype=torch.bfloat16)
    assert not torch.allclose(torch.exp(bad.float() - lse_of(bad)).sum(), torch.tensor(1.0))


def test_a_float_mask_of_keys_is_taken_apart_once(monkeypatch):
    """Every layer is given the same one, in a view of its own."""
    query, key, value = make_inputs(SHAPE, torch.float32, generator_for(11))
    bias = torch.zeros(SHAPE.batch, 1, SHAPE.keys)
    bias[0, 0, 4:], bias[1] = -10000.0, float("-inf")
    masked = key.clone()
    masked[1] = float("nan")
    expected = attention(query, key, value, attn_mask=bias.unsqueeze(1), backend="eager")
    made, plain = [], Tensor.masked_fill
    monkeypatch.setattr(Tensor, "masked_fill", lambda *given: made.append(1) or plain(*given))
    with torch.no_grad():
        for _ in range(3):
            found = through_sdpa(query, masked, value, attn_mask=bias.unsqueeze(1))
            torch.testing.assert_close(found, expected)
    assert len(made) == 1
    assert not found[1].any()
    bias[1] = 0.0  # written to
    for mask in (bias, bias.clone()):
        expected = attention(query, key, value, attn_mask=mask.unsqueeze(1), backend="eager")
        made.clear()
        for _ in range(2):
            torch.testing.assert_close(through_sdpa(query, key, value, attn_mask=mask.unsqueeze(1)), expected)
        assert len(made) == 1


def test_the_gradient_of_a_float_mask_of_keys():
    query, key, value = make_inputs(SHAPE, torch.float64, generator_for(13))
    bias = torch.randn(SHAPE.batch, 1, 1, SHAPE.keys, dtype=torch.float64, generator=generator_for(13))
    bias[0, ..., 2], bias[2] = float("-inf"), float("-inf")
    found = [bias.clone().requires_grad_() for _ in range(2)]
    for each, backend in zip(found, ("sdpa", "eager"), strict=True):
        attention(query, key, value, attn_mask=each, backend=backend).square().sum().backward()
    torch.testing.assert_close(found[0].grad, found[1].grad)
