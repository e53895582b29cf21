"""The kernels for packed rows on Triton's interpreter, against the float64 specification under the tolerance rule."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from mmattn.errors import BackendError
from mmattn.ops.attention import attention
from mmattn.ops.backends import triton_packed
from mmattn.ops.packed import packed_attention
from mmattn.ops.registry import TABLE
from mmattn.ops.segments import Segments
from tests.kernels.packed_cases import LONG_AMONG_SHORT, MIXED, OTHERS, OTHERS_OF_LONG, Packed, check_packed
from tests.ops.cases import Shape, generator_for, make_inputs, make_key_mask
from tests.tolerance import check_attention

pytest.importorskip("triton")
pytestmark = pytest.mark.interpreter

# Imported here, after the check: they need triton.
from mmattn.kernels import packed_rows, packed_rows_backward, packed_rows_forward  # noqa: E402
from mmattn.kernels.packed_rows import (  # noqa: E402
    attend,
    packed_rows_attention,
    packed_rows_attention_backward,
)
from mmattn.kernels.packed_rows_blocks import RowsConfig  # noqa: E402
from mmattn.kernels.packed_rows_forward import num_blocks  # noqa: E402

CASES = [
    Packed(MIXED, MIXED, 1, 1, 64),
    Packed(MIXED, OTHERS, 3, 1, 40),
    Packed(LONG_AMONG_SHORT, LONG_AMONG_SHORT, 3, 3, 32),
    Packed(OTHERS_OF_LONG, LONG_AMONG_SHORT, 2, 2, 128),
    Packed(LONG_AMONG_SHORT, OTHERS_OF_LONG, 2, 1, 80),
    Packed((1,), (67,), 1, 1, 96),
    Packed((64,) * 3, (16,) * 3, 2, 1, 160),
    Packed((2, 3), (3, 5), 1, 1, 23),
]
SMALL = Packed((2, 13, 1, 31), (3, 7, 5, 1), 3, 1, 40)


@pytest.mark.parametrize("is_causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_sizes(case, is_causal):
    # One type a size, the other for the next: each path is run in both.
    dtype = (torch.float16, torch.float32)[(CASES.index(case) + is_causal) % 2]
    got = check_packed(case, is_causal, case.rows(dtype))
    empty = ~case.mask(is_causal).any(1)
    for name in ("output", "grad of query"):
        assert not got[name][0, :, empty].any()


@pytest.mark.parametrize("is_causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_huge_scores(dtype, is_causal):
    query, key, value = SMALL.rows(dtype)
    check_packed(SMALL, is_causal, (query * 300, key, value), has_rounded_products=dtype is torch.float16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_slices_of_one_tensor(dtype):
    """As a packed projection gives them; and heads that do not begin at 16 bytes."""
    case = Packed(MIXED, MIXED, 2, 2, 40)
    segments, _ = case.segments()
    together = torch.randn(sum(MIXED), 3, 2, 43, generator=generator_for(5)).to(dtype)[..., 3:].requires_grad_()
    own = [part.detach().contiguous().requires_grad_() for part in together.unbind(1)]
    wanted = packed_attention(*own, segments, is_causal=True, backend="triton_packed")
    output = packed_attention(*together.unbind(1), segments, is_causal=True, backend="triton_packed")
    torch.testing.assert_close(output, wanted)
    cotangent = torch.randn(43, 2, sum(MIXED), generator=generator_for(7)).to(dtype).permute(2, 1, 0)[..., 3:]
    (grad,) = torch.autograd.grad(output, together, cotangent)
    for got, want in zip(grad.unbind(1), torch.autograd.grad(wanted, own, cotangent.contiguous()), strict=True):
        torch.testing.assert_close(got, want)


def results(rows, segments, is_causal=True):
    leaves = [tensor.detach().requires_grad_() for tensor in rows]
    output = packed_attention(*leaves, *segments, is_causal=is_causal, backend="triton_packed")
    return output.detach(), *torch.autograd.grad(output, leaves, output.detach() + 1)


def test_equal_bits():
    rows, segments = SMALL.rows(torch.float16), SMALL.segments()
    for one, other in zip(results(rows, segments), results(rows, segments), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("spoilt", ["query", "key", "value"])
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_sequence_does_not_see_its_neighbours_not_even_a_nan(spoilt, number):
    rows, segments = SMALL.rows(torch.float32), SMALL.segments()
    place = ("query", "key", "value").index(spoilt)
    clean = results(rows, segments, is_causal=False)
    changed = [tensor.clone() for tensor in rows]
    begin, end = ((2, 15), (3, 10), (3, 10))[place]  # the second sequence
    changed[place][begin + 1, 0, 5] = number
    spoiled = results(changed, segments, is_causal=False)
    for got, want, (first, last) in zip(spoiled, clean, ((2, 15), (2, 15), (3, 10), (3, 10)), strict=True):
        others = torch.ones(len(want), dtype=torch.bool)
        others[first:last] = False
        torch.testing.assert_close(got[others], want[others])
        assert not got[first:last].isfinite().all()
    assert begin < end


def test_a_nan_in_the_output_gradient_stays_in_its_sequence():
    rows, segments = SMALL.rows(torch.float32), SMALL.segments()
    gradients = []
    for number in (1.0, float("nan")):
        leaves = [tensor.detach().requires_grad_() for tensor in rows]
        output = packed_attention(*leaves, *segments, backend="triton_packed")
        cotangent = torch.ones_like(output)
        cotangent[3, 0, 7] = number
        gradients.append(torch.autograd.grad(output, leaves, cotangent))
    for want, got, (first, last) in zip(*gradients, ((2, 15), (3, 10), (3, 10)), strict=True):
        others = torch.ones(len(want), dtype=torch.bool)
        others[first:last] = False
        torch.testing.assert_close(got[others], want[others])
        assert got[first:last].isnan().any()


@pytest.mark.parametrize(
    ("key_kind", "is_causal"), [("none", True), ("gaps", False), ("nothing", False), ("right", False)]
)
def test_padded_calls(key_kind, is_causal):
    """Unpadded first: keys of no sequence, and sequences without keys."""
    shape = Shape(3, 6, 2, 13, 29, 40)
    generator = generator_for(11)
    query, key, value = make_inputs(shape, torch.float16, generator)
    mask = make_key_mask(key_kind, shape, generator)
    if mask is not None:
        unused = ~mask[:, None, :, None]
        key, value = key.masked_fill(unused, float("nan")), value.masked_fill(unused, float("nan"))
    check_attention(
        lambda *args, **options: attention(*args, **options, backend="triton_packed"),
        query, key, value, key_mask=mask, is_causal=is_causal,
    )  # fmt: skip


def test_log_sum_exp():
    (query, key, value), (queries, keys) = SMALL.rows(torch.float32), SMALL.segments()
    places = (queries.cu_seqlens, keys.cu_seqlens, queries.row_numbers(), keys.row_numbers())
    _, lse = packed_rows_attention(query, key, value, *places, True, 0.3)
    scores = 0.3 * torch.einsum("nhd,md->hnm", query.double(), key[:, 0].double())
    expected = scores.masked_fill(~SMALL.mask(True), float("-inf")).logsumexp(-1)
    assert (expected == float("-inf")).any()
    torch.testing.assert_close(lse, expected.float())


def test_opcheck():
    rows, (queries, keys) = SMALL.rows(torch.float32), SMALL.segments()
    leaves = [tensor.requires_grad_() for tensor in rows]
    places = (queries.cu_seqlens, keys.cu_seqlens, queries.row_numbers(), keys.row_numbers())
    torch.library.opcheck(packed_rows_attention, (*leaves, *places, True, 0.3))
    detached = [tensor.detach() for tensor in leaves]
    output, lse = packed_rows_attention(*detached, *places, False, 0.3)
    torch.library.opcheck(packed_rows_attention_backward, (output, *detached, output, lse, *places, False, 0.3))


def test_eager_calls_go_round_the_dispatcher(monkeypatch):
    rows, (queries, keys) = SMALL.rows(torch.float32), SMALL.segments()
    places = (queries.cu_seqlens, keys.cu_seqlens, queries.row_numbers(), keys.row_numbers())
    expected, _ = packed_rows_attention(*rows, *places, True, 0.3)
    monkeypatch.setattr(packed_rows, "packed_rows_attention", None)
    monkeypatch.setattr(packed_rows, "packed_rows_attention_backward", None)
    assert torch.equal(attend(*rows, *places, True, 0.3), expected)
    leaves = [tensor.requires_grad_() for tensor in rows]
    attend(*leaves, *places, True, 0.3).sum().backward()
    assert all(leaf.grad is not None for leaf in leaves)


def test_one_graph_for_batches_of_any_sequences():
    """Forward and backward in one graph each, for all numbers of rows and of sequences."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.backends.debugging.aot_eager(graph, inputs)

    def call(query, key, value, queries, keys):
        return packed_attention(query, key, value, queries, keys, is_causal=True, backend="triton_packed")

    torch.compiler.reset()
    compiled = torch.compile(call, backend=backend, fullgraph=True)
    for lengths, others in (
        ((3, 5), (2, 7)),
        ((2, 13, 1), (3, 7, 5)),
        ((5, 1, 1, 7), (1, 2, 3, 4)),
        ((11,) * 5, (3,) * 5),
    ):
        case = Packed(lengths, others, 2, 1, 16)
        rows = [tensor.requires_grad_() for tensor in case.rows(torch.float32)]
        segments = [Segments.of(lengths), Segments.of(others)]
        for each in segments:
            each.row_numbers()  # as models do, outside of their layers
        output, wanted = compiled(*rows, *segments), call(*rows, *segments)
        assert torch.equal(output, wanted)
        for got, want in zip(
            torch.autograd.grad(output.sum(), rows), torch.autograd.grad(wanted.sum(), rows), strict=True
        ):
            assert torch.equal(got, want)
    torch.compiler.reset()
    assert len(graphs) == 2  # of the first sizes, and of all others


@pytest.mark.parametrize("config", [RowsConfig(16, 32), RowsConfig(128, 16), RowsConfig(32, 128)], ids=str)
def test_every_configuration_computes_the_same(monkeypatch, config):
    for module in (packed_rows, packed_rows_forward, packed_rows_backward):
        monkeypatch.setattr(module, "rows_config", lambda *_, **__: config)
    case = dataclasses.replace(CASES[1], head_dim=16)
    for is_causal in (False, True):
        check_packed(case, is_causal, case.rows(torch.float32))


def test_blocks_are_as_many_or_a_few_more():
    for rows in (1, 15, 63, 64, 65, 1021, 65536, 65537, 5_000_011):
        blocks = num_blocks(rows, 64)
        assert blocks * 64 >= rows
        assert blocks <= -(-rows // 64) * 1.13 + 1
    assert len({num_blocks(rows, 64) for rows in range(32768, 65537)}) <= 17


def test_refusals():
    rows, segments = SMALL.rows(torch.float32), SMALL.segments()
    for options, change, reason in (
        ({"dropout_p": 0.1}, lambda t: t, "dropout"),
        ({}, lambda t: t.double(), r"dtype float64 on cpu \(serves float32, float16\)"),
        ({}, lambda t: t.repeat(1, 1, 5), r"head_dim 200 \(serves 1 to 160\)"),
    ):
        with pytest.raises(BackendError, match=f"'triton_packed' cannot serve this call: {reason}"):
            packed_attention(*map(change, rows), *segments, backend="triton_packed", **options)


def test_auto_takes_it_for_short_sequences_only(monkeypatch):
    seen, most = [], triton_packed.AUTO_PACKED_MEAN_KEYS
    row = next(row for row in TABLE if row.name == "triton_packed")

    def spy(request):
        seen.append(request.key.shape[0])
        return request.query

    spied = tuple(dataclasses.replace(each, run_packed=spy) if each is row else each for each in TABLE)
    monkeypatch.setattr("mmattn.ops.registry.TABLE", spied)
    # Queries are long in both: it is keys that count.
    for keys in (most, most + 1):
        case = Packed((3, 599), (keys - 1, keys + 1), 1, 1, 8)
        packed_attention(*case.rows(torch.float32), *case.segments())
    assert seen == [2 * most]


def test_auto_takes_it_for_longer_ones_where_those_were_measured(monkeypatch):
    """Half types, heads up to 64, a Hopper card: looked at in calls on a card that is not there."""
    monkeypatch.setattr(triton_packed, "compute_capability", lambda device: (9, 0))
    few, many = triton_packed.AUTO_PACKED_MEAN_KEYS, triton_packed.AUTO_PACKED_MEAN_KEYS_MEASURED

    def most(head_dim, dtype, is_cuda=True):
        key = SimpleNamespace(is_cuda=is_cuda, dtype=dtype, shape=(100, 2, head_dim), device="cuda")
        return triton_packed.BACKEND.auto_packed_mean_keys(SimpleNamespace(key=key))

    assert most(64, torch.bfloat16) == most(40, torch.float16) == many > few
    assert most(72, torch.bfloat16) == most(64, torch.float32) == most(64, torch.bfloat16, is_cuda=False) == few
    monkeypatch.setattr(triton_packed, "compute_capability", lambda device: (8, 0))
    assert most(64, torch.bfloat16) == few
