"""The short-key kernels on a CUDA card, in every type, under the tolerance rule."""

import itertools

import pytest
import torch

from mmattn.ops.attention import attention
from mmattn.ops.registry import explain
from mmattn.ops.replay import replayed
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


def others_of(call, shift):
    """Tensors of the same sizes and strides, `shift` elements beyond where an allocation begins, with other values."""
    tensors = []
    for tensor in (call.query, call.key, call.value):
        flat = torch.empty(tensor.numel() + shift, dtype=tensor.dtype, device=tensor.device)[shift:]
        tensors.append(flat.view(tensor.shape).copy_(tensor.roll(1, dims=-1) * 1.25))
    return tensors


@pytest.mark.parametrize("shape", [FEW_KEYS, MANY_KEYS, Shape(2, 4, 4, 257, 77, 64)], ids=str)
def test_remembered_launches(shape):
    """The first call of a size is launched by Triton, later ones as remembered: wherever their tensors are."""
    generator = generator_for(41)
    call = make_call(shape, torch.bfloat16, "none", "gaps", generator)
    for _ in range(2):
        check_attention(triton_attention, call.query, call.key, call.value, key_mask=call.key_mask)
    for shift in (8, 1, 8, 0, 3):
        query, key, value = others_of(call, shift)
        # That works on copies, which begin where allocations do.
        got = check_attention(triton_attention, query, key, value, key_mask=call.key_mask, what=f"{shift} on")
        with torch.no_grad():
            expected = triton_attention(query, key, value, key_mask=call.key_mask)
        torch.testing.assert_close(expected, got["output"])
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), torch.inference_mode():
        output = triton_attention(query, key, value, key_mask=call.key_mask)
    torch.cuda.current_stream().wait_stream(side)
    assert torch.equal(output, expected)


@pytest.mark.parametrize("key_kind", ["none", "gaps"])
def test_both_roads_give_the_same_bits(key_kind):
    """Round the dispatcher, and through the operation, which compiled code calls."""
    from mmattn.kernels.short_keys import attend, short_key_attention

    for shape in (FEW_KEYS, MANY_KEYS):
        call = make_call(shape, torch.float16, "none", key_kind, generator_for(43))
        mask = None if call.key_mask is None else call.key_mask.unsqueeze(1)
        inputs = [tensor.requires_grad_() for tensor in (call.query, call.key, call.value)]
        results = []
        for road in (attend, attend, lambda *arguments: short_key_attention(*arguments)[0]):
            output = road(*inputs, mask, None, 0.3)
            results.append((output, *torch.autograd.grad(output.float().square().sum(), inputs)))
        for first, second, third in zip(*results, strict=True):
            assert torch.equal(first, second)
            assert torch.equal(first, third)


def test_backward_replayed_as_a_graph():
    call = make_call(Shape(2, 4, 4, 129, 77, 40), torch.bfloat16, "none", "gaps", generator_for(47))
    inputs = [tensor.requires_grad_() for tensor in (call.query, call.key, call.value)]

    def step():
        output = triton_attention(*inputs, key_mask=call.key_mask)
        return torch.autograd.grad(output, inputs, torch.ones_like(output))

    expected = step()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for tensor in captured:
        tensor.fill_(float("nan"))
    graph.replay()
    for got, wanted in zip(captured, expected, strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.skipif(DEVICE == "cpu", reason="only for cards")
@pytest.mark.parametrize("has_grad", [False, True])
def test_auto_takes_them_where_they_were_measured(has_grad):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("measured on compute capability 9.0 only")
    call = make_call(Shape(2, 8, 8, 4096, 77, 40), torch.bfloat16, "none", "right", generator_for(97))
    tensors = [tensor.requires_grad_(has_grad) for tensor in (call.query, call.key, call.value)]
    assert explain(*tensors, key_mask=call.key_mask).chosen == "triton"
    assert explain(*tensors).chosen == "sdpa"
    with replayed():
        assert explain(*tensors).chosen == "triton"
        compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(*tensors), attention(*tensors, backend="triton"))
    masked = torch.compile(attention, fullgraph=True, backend="aot_eager")
    got = masked(*tensors, key_mask=call.key_mask)
    assert torch.equal(got, attention(*tensors, key_mask=call.key_mask, backend="triton"))
