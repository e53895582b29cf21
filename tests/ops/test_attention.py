"""The operation's arguments: what is refused and how, defaults, dropout, observers, dispatch forms of sdpa."""

import pytest
import torch
import torch.nn.functional as F

from mmattn.errors import UsageError
from mmattn.ops import limits, masks
from mmattn.ops.attention import attention
from mmattn.ops.backends import sdpa
from mmattn.ops.observe import observing


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


QUERY, KEY, VALUE = draw(2, 6, 7, 5), draw(2, 3, 11, 5, seed=1), draw(2, 3, 11, 5, seed=2)

REFUSED = [
    ({"query": draw(6, 7, 5)}, r"query must be \[B, H, Lq, D\]"),
    ({"value": draw(2, 3, 13, 5)}, r"key and value both \[B, G, Lk, D\]"),
    ({"key": draw(3, 3, 11, 5), "value": draw(3, 3, 11, 5)}, "batch and head_dim must be equal"),
    ({"query": draw(2, 5, 7, 5)}, "number of query heads a multiple of the key/value heads"),
    ({"query": draw(2, 6, 7, 5).double()}, "must share one float dtype"),
    ({"query": torch.empty(2, 6, 7, 5, device="meta")}, "query is on meta, key on cpu"),
    ({"attn_mask": torch.ones(7, 11, dtype=torch.int64)}, "attn_mask is torch.int64; give a boolean mask"),
    ({"attn_mask": torch.ones(11, dtype=torch.bool)}, r"attn_mask has rank 1; use \[Lq, Lk\]"),
    ({"attn_mask": torch.ones(11, 7, dtype=torch.bool)}, r"does not broadcast to \[B, H, Lq, Lk\] = \[2, 6, 7, 11\]"),
    ({"attn_mask": torch.ones(2, 11, dtype=torch.bool)}, r"for padding \[B, Lk\] use key_mask"),
    ({"attn_mask": torch.ones(2, 3, 7, 11, dtype=torch.bool)}, "does not broadcast"),
    ({"key_mask": torch.ones(2, 11, dtype=torch.int64)}, r"convert a 1/0 mask with .bool\(\)"),
    ({"key_mask": torch.ones(2, 7, dtype=torch.bool)}, r"must be boolean \[B, Lk\] = \[2, 11\]"),
    ({"key_mask": torch.ones(2, 11, dtype=torch.bool, device="meta")}, "key_mask is on meta, query on cpu"),
    ({"query": QUERY.numpy()}, "query is a ndarray, key a Tensor, value a Tensor; all must be tensors"),
    ({"value": None}, "query is a Tensor, key a Tensor, value a NoneType; all must be tensors"),
    ({"attn_mask": [[True] * 11] * 7}, "attn_mask is a list, it must be a tensor"),
    ({"key_mask": torch.ones(2, 11, dtype=torch.bool).numpy()}, "key_mask is a ndarray, it must be a tensor"),
    ({"scale": float("nan")}, "scale is nan, it must be a finite number"),
    ({"scale": float("-inf")}, "scale is -inf, it must be a finite number"),
    ({"scale": torch.tensor(0.5, requires_grad=True)}, "multiply the query by the tensor and pass scale=1.0"),
    ({"dropout_p": 1.0}, "dropout_p is 1.0, it must be at least 0 and below 1"),
]


@pytest.mark.parametrize(("changed", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_refused_arguments(changed, message):
    arguments = {"query": QUERY, "key": KEY, "value": VALUE} | changed
    with pytest.raises(UsageError, match=message) as error:
        attention(arguments.pop("query"), arguments.pop("key"), arguments.pop("value"), **arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_rank_alone_decides_what_a_mask_means(backend):
    """With B == Lq a [Lq, Lk] mask is not taken for a [B, Lk] one, nor [B, Lq, Lk] for [H, Lq, Lk]."""
    query, key, value = draw(3, 3, 3, 5), draw(3, 3, 11, 5, seed=1), draw(3, 3, 11, 5, seed=2)
    mask = torch.rand(3, 11, generator=torch.Generator().manual_seed(3)) < 0.7
    expected = attention(query, key, value, attn_mask=mask.expand(3, 3, 3, 11), backend=backend)
    torch.testing.assert_close(attention(query, key, value, attn_mask=mask, backend=backend), expected)
    batch_mask = torch.rand(3, 3, 11, generator=torch.Generator().manual_seed(4)) < 0.7
    expected = attention(query, key, value, attn_mask=batch_mask[:, None].expand(3, 3, 3, 11), backend=backend)
    torch.testing.assert_close(attention(query, key, value, attn_mask=batch_mask, backend=backend), expected)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize(
    "shape", [(1, 1), (7, 1), (1, 11), (2, 1, 11), (1, 7, 1), (2, 1, 1, 11), (1, 6, 7, 1)], ids=str
)
def test_axes_of_size_one_broadcast(backend, shape):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(5)) < 0.6
    four = mask[:, None] if mask.dim() == 3 else mask
    expected = attention(QUERY, KEY, VALUE, attn_mask=four.expand(2, 6, 7, 11), backend="eager")
    got = attention(QUERY, KEY, VALUE, attn_mask=mask, backend=backend)
    torch.testing.assert_close(got, expected)


def test_plain_call_is_torch_bit_for_bit():
    query, key, value = draw(2, 3, 7, 5), draw(2, 3, 11, 5), draw(2, 3, 11, 5, seed=1)
    assert torch.equal(attention(query, key, value), F.scaled_dot_product_attention(query, key, value))


@pytest.mark.parametrize("mask_dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_what_is_finite_in_a_wider_mask_stays_finite(backend, dtype, mask_dtype):
    """A row of nothing but the least number of a wider dtype attends to all keys evenly: that is not -inf."""
    query, key, value = (tensor.to(dtype) for tensor in (QUERY, KEY, VALUE))
    bias = torch.zeros(7, 11, dtype=mask_dtype)
    bias[2] = torch.finfo(mask_dtype).min
    bias[3], bias[4, 5:] = float("-inf"), torch.finfo(mask_dtype).min
    output = attention(query, key, value, attn_mask=bias, backend=backend)
    mean = value.double().mean(dim=2).repeat_interleave(2, dim=1)
    torch.testing.assert_close(output[:, :, 2].double(), mean, atol=4 * torch.finfo(dtype).eps, rtol=0)
    assert not output[:, :, 3].any()
    cut = attention(query[:, :, 4:5], key[:, :, :5], value[:, :, :5], backend="eager")
    torch.testing.assert_close(output[:, :, 4:5], cut, atol=4 * torch.finfo(dtype).eps, rtol=0)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_dropout_keeps_the_mean_and_drops_the_share(backend):
    torch.manual_seed(0)
    query, key = torch.zeros(1, 4, 500, 64), torch.zeros(1, 2, 64, 64)
    value = torch.eye(64).expand(1, 2, 64, 64) * 64
    output = attention(query, key, value, dropout_p=0.25, backend=backend)
    assert abs((output == 0).float().mean().item() - 0.25) < 0.01
    assert abs(output.mean().item() - 1.0) < 0.02
    torch.testing.assert_close(output[output != 0], torch.full_like(output[output != 0], 4 / 3))


def test_autocast_casts_the_inputs():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = attention(QUERY, KEY.bfloat16(), VALUE)
    assert output.dtype is torch.bfloat16


def test_observers_get_every_call_and_change_nothing():
    key_mask = torch.ones(2, 11, dtype=torch.bool)
    attn_mask = torch.ones(7, 11, dtype=torch.bool)
    plain = attention(QUERY, KEY, VALUE, key_mask=key_mask, attn_mask=attn_mask, role="cross")
    first, second = [], []
    caller = object()
    with observing(first.append):
        with observing(second.append):
            seen = attention(QUERY, KEY, VALUE, key_mask=key_mask, attn_mask=attn_mask, role="cross", caller=caller)
        attention(QUERY, KEY, VALUE, is_causal=True)
    attention(QUERY, KEY, VALUE)
    assert torch.equal(seen, plain)
    assert (len(first), len(second)) == (2, 1)
    call = second[0]
    assert call.query is QUERY
    assert call.key is KEY
    assert call.value is VALUE
    assert call.output is seen
    assert call.caller is caller
    assert call.key_mask is key_mask
    assert list(call.attn_mask.shape) == [1, 1, 7, 11]
    assert (call.role, call.backend, call.is_causal, call.scale) == ("cross", "sdpa", False, 5**-0.5)
    assert first[1].is_causal


@pytest.mark.parametrize("is_causal", [False, True])
def test_rows_of_unequal_length_cut_or_masked_give_the_same(monkeypatch, is_causal):
    lengths = torch.tensor([11, 3, 3, 7, 1])
    query, key, value = (draw(5, heads, 11, 5, seed=heads, dtype=torch.float64) for heads in (6, 2, 2))
    key_mask = masks.lengths_mask(lengths, 11)
    results = []
    for cheaper in (False, True):
        monkeypatch.setattr(sdpa, "_runs_are_cheaper", lambda *_, cheaper=cheaper: cheaper)
        tensors = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
        output = attention(*tensors, key_mask=key_mask, is_causal=is_causal, backend="sdpa")
        output.square().sum().backward()
        results.append([output, *(tensor.grad for tensor in tensors)])
    for masked, cut in zip(*results, strict=True):
        torch.testing.assert_close(cut, masked, rtol=0, atol=1e-13)


def test_padding_costs_no_more_than_it_must(monkeypatch):
    """Equal lengths are cut to a view; long unequal rows of a decoding step go one by one; short ones are masked."""
    calls = []

    def spy(query, key, value, mask=None, *args, **kwargs):
        calls.append((query.shape[0], key.shape[2], mask is not None))
        return torch.empty_like(query)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)

    def forms(lengths, num_keys, num_queries):
        calls.clear()
        key = torch.zeros(len(lengths), 2, num_keys, 64)
        query = torch.zeros(len(lengths), 8, num_queries, 64)
        attention(query, key, key, key_mask=masks.lengths_mask(torch.tensor(lengths), num_keys), backend="sdpa")
        return list(calls)

    assert forms([30, 30, 30], 40, 1) == [(3, 30, False)]
    assert forms([40, 40, 40], 40, 1) == [(3, 40, False)]
    assert forms([30, 20, 25], 40, 1) == [(3, 30, True)]
    assert forms([4000, 4000, 900, 100], 4000, 1) == [(2, 4000, False), (1, 900, False), (1, 100, False)]


def test_key_spans():
    mask = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]]).bool()
    assert masks.key_spans(mask) == ([(0, 2), (1, 3), (0, 0), (0, 4)], True)
    assert masks.key_spans(torch.tensor([[1, 0, 1, 0]]).bool()) == ([(0, 3)], False)
    assert masks.key_spans(mask.t().contiguous().t()) == masks.key_spans(mask)
    of_a_picture = torch.from_numpy((mask.numpy() * 255).astype("uint8").view(bool))
    assert masks.key_spans(of_a_picture) == masks.key_spans(mask)


@pytest.mark.slow
@pytest.mark.parametrize("is_causal", [False, True])
def test_compiles_into_one_graph(is_causal):
    key_mask = masks.lengths_mask(torch.tensor([9, 4]), 11)
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    got = compiled(QUERY, KEY, VALUE, key_mask=key_mask, is_causal=is_causal)
    torch.testing.assert_close(got, attention(QUERY, KEY, VALUE, key_mask=key_mask, is_causal=is_causal))


def test_what_a_card_is_asked_does_not_break_a_compiled_graph(monkeypatch):
    # As the real one: torch.compile cannot trace it. (What is remembered of a card would outlast this test.)
    monkeypatch.setattr(limits, "_capability_of", torch.compiler.disable(lambda device: (9, 0)))

    def call(query):
        with sdpa._safe_kernels(query, query, query, None):  # as for a CUDA tensor: few heads, so the card is asked
            return F.scaled_dot_product_attention(query, query, query)

    query = draw(2, 3, 7, 5).requires_grad_()
    compiled = torch.compile(call, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(query), call(query))


def test_a_static_mask_of_dynamic_queries_is_traced():
    """torch.compile makes sizes dynamic by tensor: those of a mask may stay numbers."""

    def call(query, key, value, mask):
        return attention(query, key, value, attn_mask=mask, backend="sdpa")

    torch.compiler.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for num_queries, num_keys in ((17, 29), (13, 31)):
        tensors = [torch.randn(2, 3, length, 8) for length in (num_queries, num_keys, num_keys)]
        for tensor in tensors:
            torch._dynamo.maybe_mark_dynamic(tensor, 2)
        mask = torch.rand(num_queries, num_keys) < 0.7
        torch._dynamo.mark_static(mask)
        assert torch.equal(compiled(*tensors, mask), call(*tensors, mask))
    torch.compiler.reset()
