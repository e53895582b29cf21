"""The kernels for packed rows on a CUDA card, in every type, under the tolerance rule, beside varlen and compiled."""

import pytest
import torch

from mmattn.ops.packed import packed_attention
from mmattn.ops.segments import Segments
from tests.gpu.card import DEVICE, DTYPES, HALF_TYPES, MARKS, USABLE
from tests.kernels.packed_cases import LONG_AMONG_SHORT, MIXED, OTHERS, OTHERS_OF_LONG, Packed, check_packed
from tests.ops.cases import generator_for

pytest.importorskip("triton")
pytestmark = [*MARKS, pytest.mark.skipif("triton_packed" not in USABLE, reason="the kernels cannot be used here")]

CASES = [
    Packed(MIXED, MIXED, 3, 3, 64),
    Packed(MIXED, OTHERS, 6, 2, 40),
    Packed(LONG_AMONG_SHORT * 3, LONG_AMONG_SHORT * 3, 3, 1, 32),
    Packed(OTHERS_OF_LONG, LONG_AMONG_SHORT, 2, 2, 128),
    Packed(LONG_AMONG_SHORT, OTHERS_OF_LONG, 2, 1, 80),
    Packed(MIXED * 3, OTHERS * 3, 2, 2, 96),
    Packed((64,) * 7, (16,) * 7, 2, 1, 160),
    Packed((1,), (67,), 1, 1, 72),
    Packed((601,), (601,), 2, 2, 64),
    Packed((2, 3), (3, 5), 1, 1, 23),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_sizes(case, dtype):
    for is_causal in (False, True):
        check_packed(case, is_causal, case.rows(dtype, DEVICE))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_huge_scores(dtype):
    for case in CASES[:2]:
        query, key, value = case.rows(dtype, DEVICE)
        check_packed(case, True, (query * 300, key, value), has_rounded_products=dtype is not torch.float32)


def results(rows, segments, backend="triton_packed", is_causal=True):
    leaves = [tensor.detach().requires_grad_() for tensor in rows]
    output = packed_attention(*leaves, *segments, is_causal=is_causal, backend=backend)
    cotangent = torch.randn(output.shape, generator=generator_for(3)).to(output)
    return output.detach(), *torch.autograd.grad(output, leaves, cotangent)


@pytest.mark.parametrize("dtype", HALF_TYPES, ids=str)
def test_as_varlen_and_the_same_bits_in_every_run(dtype):
    """A thousand sentences: whatever blocks they fall into."""
    lengths = torch.randint(1, 23, (1009,), generator=generator_for(13)).tolist()
    case = Packed(tuple(lengths), tuple(reversed(lengths)), 6, 2, 64)
    rows, segments = case.rows(dtype, DEVICE), case.segments(DEVICE)
    found = results(rows, segments)
    for one, other in zip(found, results(rows, segments), strict=True):
        assert torch.equal(one, other)
    exact = results([tensor.float() for tensor in rows], segments)
    theirs = results(rows, segments, "varlen") if "varlen" in USABLE else found
    for ours, varlen, want in zip(found, theirs, exact, strict=True):
        error, allowed = ((each.float() - want).norm() / want.norm() for each in (ours, varlen))
        assert error <= 2 * allowed + torch.finfo(dtype).eps


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("spoilt", [0, 1, 2])
def test_a_sequence_does_not_see_its_neighbours_not_even_a_nan(spoilt, number):
    case = Packed((2, 13, 1, 31), (2, 13, 1, 31), 2, 2, 64)
    rows, segments = case.rows(torch.bfloat16, DEVICE), case.segments(DEVICE)
    clean = results(rows, segments, is_causal=False)
    rows[spoilt][7, 0, 5] = number
    for got, want in zip(results(rows, segments, is_causal=False), clean, strict=True):
        assert not got[2:15].isfinite().all()
        for part in (slice(0, 2), slice(15, None)):
            torch.testing.assert_close(got[part], want[part])


def test_one_graph_for_batches_of_any_sequences():
    def call(query, key, value, queries, keys):
        return packed_attention(query * 2, key, value, queries, keys, is_causal=True, backend="triton_packed") + 1

    torch.compiler.reset()
    compiled = torch.compile(call, fullgraph=True, dynamic=True)
    for lengths, others in (((3, 5), (2, 7)), ((2, 13, 1), (3, 7, 5)), (MIXED, OTHERS), ((11,) * 97, (3,) * 97)):
        case = Packed(lengths, others, 2, 1, 64)
        rows = [tensor.requires_grad_() for tensor in case.rows(torch.bfloat16, DEVICE)]
        segments = case.segments(DEVICE)
        for each in segments:
            each.row_numbers()  # as models do, outside of their layers
        with torch._dynamo.config.patch(error_on_recompile=lengths == (11,) * 97):
            output = compiled(*rows, *segments)
        wanted = call(*rows, *segments)
        torch.testing.assert_close(output, wanted)
        gradients = (torch.autograd.grad(each.float().sum(), rows) for each in (output, wanted))
        for got, want in zip(*gradients, strict=True):
            torch.testing.assert_close(got, want)
    torch.compiler.reset()


def test_nobody_waits_for_the_card_and_a_graph_takes_it_in():
    if DEVICE != "cuda":
        pytest.skip("there is nobody to wait for")
    case = CASES[0]
    rows, segments = case.rows(torch.bfloat16, DEVICE), case.segments(DEVICE)
    expected = results(rows, segments)  # what is found out once may wait
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        Segments(segments[0].lengths, segments[0].cu_seqlens).row_numbers()
        packed_attention(*rows, *segments, is_causal=True, backend="triton_packed")
    finally:
        torch.cuda.set_sync_debug_mode(before)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = packed_attention(*rows, *segments, is_causal=True, backend="triton_packed")
    output.zero_()
    graph.replay()
    assert torch.equal(output, expected[0])
