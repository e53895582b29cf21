"""Padded calls on backends for rows without padding, held to the specification in float64, without a card."""

from __future__ import annotations

import functools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import varlen as torch_varlen

import mmattn
from mmattn.errors import BackendError
from mmattn.nn import CrossAttention
from mmattn.ops.attention import attention
from mmattn.ops.backends import varlen
from mmattn.ops.observe import observing
from mmattn.ops.packed import packed_attention
from mmattn.ops.segments import Segments
from mmattn.ops.unpadded import Rows, attend_unpadded
from tests.compiled_functions import check_compiled_functions
from tests.ops.cases import KEY_MASKS, SHAPES, generator_for, make_inputs, make_key_mask
from tests.ops.row_kernels import NAMES, install
from tests.tolerance import run_with_gradients

F64 = torch.float64


@pytest.fixture
def kernels(monkeypatch):
    return install(monkeypatch)


def compare(name, query, key, value, **arguments):
    """Output and gradients beside eager's, for inputs that may have NaN where no query looks."""
    tensors = {"query": query, "key": key, "value": value}
    cotangent = torch.randn(query.shape, dtype=F64, generator=generator_for(101))
    got, want = (
        run_with_gradients(functools.partial(attention, backend=backend), tensors, cotangent, **arguments)
        for backend in (name, "eager")
    )
    assert set(got) == set(want)
    for part, expected in want.items():
        torch.testing.assert_close(
            got[part], expected, rtol=1e-11, atol=1e-12, msg=lambda text, part=part: f"{part}: {text}"
        )
    return got


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("kernels")
def test_key_masks(name, shape):
    for number, kind in enumerate(KEY_MASKS):
        generator = generator_for(SHAPES.index(shape), number)
        query, key, value = make_inputs(shape, F64, generator)
        mask = make_key_mask(kind, shape, generator)
        if mask is not None:
            key, value = (t.masked_fill(~mask[:, None, :, None], float("nan")) for t in (key, value))
        got = compare(name, query, key, value, key_mask=mask)
        if mask is not None:
            unused = ~mask[:, None, :, None]
            for part in ("grad of key", "grad of value"):
                assert not got[part].masked_select(unused).any()
            assert not got["output"][~mask.any(1)].any()
            assert not got["grad of query"][~mask.any(1)].any()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("kernels")
def test_causal(name, shape):
    compare(name, *make_inputs(shape, F64, generator_for(SHAPES.index(shape), 103)), is_causal=True, scale=0.37)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scale", [-0.7, -1e-35, 0.0])
@pytest.mark.usefixtures("kernels")
def test_scales_that_are_not_positive(name, scale):
    query, key, value = make_inputs(SHAPES[3], F64, generator_for(105))
    mask = make_key_mask("gaps", SHAPES[3], generator_for(105))
    for given in ({}, {"key_mask": mask}, {"is_causal": True}):
        compare(name, query, key, value, scale=scale, **given)
    rows, segments = query.transpose(1, 2).flatten(0, 1), Segments.equal(*query[:, 0, :, 0].shape)
    got, want = (packed_attention(rows, rows, rows, segments, scale=scale, backend=each) for each in (name, "eager"))
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_grouped_heads_on_the_oldest_torch(name, monkeypatch):
    calls = install(monkeypatch, is_old_torch=True)
    compare(name, *make_inputs(SHAPES[3], F64, generator_for(107)))
    if name == "varlen":
        assert "enable_gqa" not in calls["varlen"]


def test_the_flag_for_groups_where_there_are_groups(kernels):
    for shape, has_groups in ((SHAPES[3], True), (SHAPES[0], False)):
        compare("varlen", *make_inputs(shape, F64, generator_for(109)))
        assert kernels["varlen"].get("enable_gqa", False) is has_groups


def test_what_a_kernel_gets(kernels):
    """Prefixes, gaps and an empty row: rows in order, the padded lengths as bounds, queries whole."""
    query, key, value = torch.randn(3, 2, 5, 4), torch.randn(3, 2, 7, 4), torch.randn(3, 2, 7, 4)
    mask = torch.tensor([[1, 1, 1, 0, 0, 0, 0], [0] * 7, [0, 1, 0, 1, 1, 0, 1]]).bool()
    attention(query, key, value, key_mask=mask, backend="varlen")
    call = kernels["varlen"]
    assert call["cu_seq_q"].tolist() == [0, 5, 10, 15]
    assert call["cu_seq_k"].tolist() == [0, 3, 3, 7]
    assert (call["max_q"], call["max_k"]) == (5, 7)
    assert torch.equal(call["query"], query.transpose(1, 2).flatten(0, 1))
    for name, tensor in (("key", key), ("value", value)):
        assert torch.equal(call[name][:7], tensor.transpose(1, 2)[mask])


def test_no_mask_and_rows_in_memory_are_views(kernels):
    query, key, value = (torch.randn(3, 8, 2, 8).transpose(1, 2) for _ in range(3))
    attention(query, key, value, backend="varlen")
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        assert kernels["varlen"][name].data_ptr() == tensor.data_ptr()


@pytest.mark.parametrize("cut", [slice(1, 9), slice(0, 16, 2)], ids=["starts between reads", "strides over numbers"])
def test_views_that_a_kernel_cannot_read_are_copied(kernels, cut):
    query, key, value = (torch.randn(3, 7, 2, 16, dtype=torch.float16)[..., cut].transpose(1, 2) for _ in range(3))
    attention(query, key, value, backend="varlen")
    for name in ("query", "key", "value"):
        rows = kernels["varlen"][name]
        assert rows.stride(-1) == 1
        assert rows.storage_offset() % 8 == 0
    for rows in (query, key, value):
        packed = rows.transpose(1, 2).flatten(0, 1)
        packed_attention(packed, packed, packed, Segments.of([7, 7, 7]), backend="varlen")
        assert kernels["varlen"]["query"].is_contiguous()


@pytest.mark.parametrize("sizes", [(0, 7, 11), (2, 0, 11), (2, 7, 0)], ids=["no batch", "no queries", "no keys"])
@pytest.mark.usefixtures("kernels")
def test_nothing_to_do(sizes):
    batch, queries, keys = sizes
    query = torch.randn(batch, 6, queries, 5, requires_grad=True)
    key = torch.randn(batch, 3, keys, 5)
    output = attention(query, key, key, backend="varlen", key_mask=torch.ones(batch, keys, dtype=torch.bool))
    assert torch.equal(output, torch.zeros_like(query))
    output.sum().backward()
    assert query.grad is not None
    assert not query.grad.any()


def test_dropout_is_flash_only(kernels):
    inputs = make_inputs(SHAPES[0], F64, generator_for(113))
    attention(*inputs, dropout_p=0.3, backend="flash")
    assert kernels["flash"]["dropout_p"] == 0.3
    with pytest.raises(BackendError, match="attention backend 'varlen' cannot serve this call: dropout$"):
        attention(*inputs, dropout_p=0.3, backend="varlen")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("kernels")
def test_what_it_cannot_do_is_refused_by_name(name):
    query, key, value = make_inputs(SHAPES[3], F64, generator_for(127))
    allowed = torch.ones(11, 11, dtype=torch.bool)
    for arguments, reason in (
        ({"attn_mask": allowed}, r"boolean mask on cpu \(serves causal, key\)"),
        ({"attn_mask": allowed.double()}, r"float mask on cpu \(serves causal, key\)"),
        ({"is_causal": True, "key_mask": allowed[:2]}, "a causal and a key mask in one call"),
        ({"return_weights": True}, "returning the weights"),
    ):
        with pytest.raises(BackendError, match=f"'{name}' cannot serve this call: {reason}$"):
            attention(query, key, value, backend=name, **arguments)


def test_use_backend_serves_padded_and_packed_calls(kernels):
    layer = CrossAttention(24, 4, context_dim=24).double()
    query, context = torch.randn(2, 5, 24, dtype=F64), torch.randn(2, 7, 24, dtype=F64)
    mask = torch.arange(7) < torch.tensor([[3], [7]])
    expected = layer(query, context, key_mask=mask)
    seen = []
    with mmattn.use_backend("varlen", role="cross"), observing(seen.append):
        torch.testing.assert_close(layer(query, context, key_mask=mask), expected, rtol=1e-11, atol=1e-12)
    assert [call.backend for call in seen] == ["varlen"]
    kernels.clear()
    rows = torch.randn(9, 2, 3, dtype=F64)
    with mmattn.use_backend("flash", role="cross"):
        packed_attention(rows, rows, rows, Segments.of([4, 5]), role="cross")
    assert list(kernels) == ["flash"]


@pytest.mark.usefixtures("kernels")
def test_auto_leaves_padded_calls_alone_and_takes_packed_ones(kernels):
    inputs = make_inputs(SHAPES[0], F64, generator_for(131))
    seen = []
    with observing(seen.append):
        attention(*inputs)
    assert [call.backend for call in seen] == ["sdpa"]
    rows = torch.randn(9, 2, 3, dtype=F64)
    packed_attention(rows, rows, rows, Segments.of([4, 5]))
    assert list(kernels) == ["varlen"]
    packed_attention(rows, rows, rows, Segments.of([4, 5]), dropout_p=0.1)
    assert list(kernels) == ["varlen", "flash"]


def test_the_device_is_never_waited_for():
    """Under fake tensors reading a value is an error."""
    with FakeTensorMode():
        query, key, value = (torch.empty(2, 3, length, 8, requires_grad=True) for length in (7, 11, 11))
        request = mmattn.ops.request.prepare(
            query, key, value, None, torch.empty(2, 11, dtype=torch.bool), False, None, 0.0, False
        )

        def kernel(rows: Rows) -> torch.Tensor:
            return rows.query + rows.key.sum() + rows.value.sum() + rows.key_starts.sum() + rows.query_starts.sum()

        output, _ = attend_unpadded(request, kernel)
        output.sum().backward()
        assert output.shape == query.shape
        assert key.grad is not None
        assert key.grad.shape == key.shape


@pytest.mark.parametrize("has_mask", [True, False])
def test_one_graph_when_compiled(monkeypatch, has_mask):
    install(monkeypatch)

    def varlen_attn(query, key, value, *rest, scale, window_size, enable_gqa=False):
        return query * key[:7].mean() * value[:7].mean()  # rows that are there with a mask, too

    monkeypatch.setattr(torch_varlen, "varlen_attn", varlen_attn)
    query, key, value = (tensor.requires_grad_() for tensor in make_inputs(SHAPES[3], F64, generator_for(137)))
    mask = torch.ones(SHAPES[3].batch, SHAPES[3].keys, dtype=torch.bool) if has_mask else None
    function = functools.partial(attention, backend="varlen", key_mask=mask)
    check_compiled_functions(function, query, key, value, count=2 if has_mask else 0)


def test_the_signature_is_looked_at_once():
    varlen._takes_flag.cache_clear()
    assert varlen._has_flag_for_groups() is varlen._has_flag_for_groups() is True
    assert varlen._takes_flag.cache_info().hits == 1
