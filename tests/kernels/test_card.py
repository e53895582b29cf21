"""The short-key kernels on a CUDA card, in every type, under the tolerance rule."""

import itertools

import pytest
import torch

from mmattn.ops.attention import attention
from tests.gpu.card import DEVICE, DTYPES, HALF_TYPES, MARKS, USABLE, make_call
from tests.kernels.cases import FEW_KEYS, GROUPED, MANY_KEYS, SHAPES, poisoned, triton_attention
from tests.ops.cases import Shape, allowed_everywhere, generator_for, used_by_anyone
from tests.tolerance import check_attention

pytest.importorskip("triton")
pytestmark = [*MARKS, pytest.mark.skipif("triton" not in USABLE, reason="the triton backend cannot be used here")]

# Those of U-Nets too, with few heads.
ALL = [*SHAPES, *GROUPED, *(Shape(2, 2, 2, 1031, 77, dim) for dim in (40, 64, 80, 160)), Shape(1, 3, 3, 257, 300, 72)]


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [*((shape, torch.bfloat16) for shape in ALL), *itertools.product(ALL[::3], (torch.float16, torch.float32))],
    ids=str,
)
def test_sizes(shape, dtype):
    call = make_call(shape, dtype, "none", "none", generator_for(ALL.index(shape), 3))
    check_attention(triton_attention, call.query, call.key, call.value)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [FEW_KEYS, MANY_KEYS, GROUPED[0]], ids=str)
def test_masks(shape, dtype):
    for attn_kind, key_kind in (("boolean", "none"), ("none", "gaps"), ("empty-rows", "nothing")):
        call = make_call(shape, dtype, attn_kind, key_kind, generator_for(7))
        masks = {name: None if mask is None else mask.cpu() for name, mask in call.masks.items()}
        allowed = allowed_everywhere(shape, masks["attn_mask"], masks["key_mask"])
        unused = ~used_by_anyone(shape, allowed).to(DEVICE)
        key, value = poisoned(call.key, unused), poisoned(call.value, unused)
        got = check_attention(triton_attention, call.query, key, value, **call.masks, what=f"{attn_kind} {key_kind}")
        empty = ~allowed.any(-1).to(DEVICE)
        assert not got["output"][empty].any()
        assert not got["grad of query"][empty].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [FEW_KEYS, MANY_KEYS], ids=str)
def test_huge_and_strongly_negative_scores(shape, dtype):
    call = make_call(shape, dtype, "none", "none", generator_for(17))
    has_rounded_products = dtype in HALF_TYPES
    for query, key in ((call.query * 300, call.key), (call.query.abs() + 4, -(call.key.abs() + 4))):
        check_attention(triton_attention, query, key, call.value, has_rounded_products=has_rounded_products)


@pytest.mark.parametrize("shape", [FEW_KEYS, MANY_KEYS], ids=str)
def test_views_and_equal_bits(shape):
    """[B, L, H, D] storage, heads that do not begin at 16 bytes; every run gives the same bits."""
    call = make_call(shape, torch.bfloat16, "none", "gaps", generator_for(29))
    query = call.query.transpose(1, 2).contiguous().transpose(1, 2)
    odd = torch.cat([call.key, call.key[..., :1]], dim=3)[..., 1:]
    tensors = [tensor.requires_grad_() for tensor in (query, odd, call.value)]
    dense = [tensor.detach().contiguous().requires_grad_() for tensor in tensors]
    runs = []
    for inputs in (tensors, tensors, dense):
        output = triton_attention(*inputs, key_mask=call.key_mask)
        runs.append((output, *torch.autograd.grad(output.float().square().sum(), inputs)))
    for first, second, other in zip(*runs, strict=True):
        assert torch.equal(first, second)
        torch.testing.assert_close(first, other)


def test_compiled_whole():
    """Inductor keeps the operation, forward and backward."""
    call = make_call(FEW_KEYS, torch.bfloat16, "none", "gaps", generator_for(31))
    query = call.query.requires_grad_()
    expected = triton_attention(query, call.key, call.value, key_mask=call.key_mask)
    (wanted,) = torch.autograd.grad(expected.float().sum(), query)
    compiled = torch.compile(triton_attention, fullgraph=True)
    output = compiled(query, call.key, call.value, key_mask=call.key_mask)
    assert torch.equal(output, expected)
    assert torch.equal(torch.autograd.grad(output.float().sum(), query)[0], wanted)


def test_replayed_as_a_graph():
    call = make_call(Shape(2, 8, 8, 1024, 77, 80), torch.bfloat16, "none", "none", generator_for(37))
    tensors = (call.query, call.key, call.value)
    expected = attention(*tensors, backend="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = attention(*tensors, backend="triton")
    output.fill_(float("nan"))
    graph.replay()
    assert torch.equal(output, expected)
