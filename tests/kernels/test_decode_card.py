"""The decode kernels on a CUDA card, in every type, under the tolerance rule."""

import functools
import itertools

import pytest
import torch

from mmattn.ops.attention import attention
from mmattn.ops.registry import explain
from mmattn.ops.replay import replayed
from mmattn.ops.static_cache import visible_places
from tests.gpu.card import DEVICE, DTYPES, MARKS, USABLE, make_call
from tests.kernels.cases import poisoned
from tests.ops.cases import Shape, allowed_everywhere, generator_for, used_by_anyone
from tests.tolerance import check_attention

pytest.importorskip("triton")
pytestmark = [*MARKS, pytest.mark.skipif("triton_decode" not in USABLE, reason="the kernels cannot be used here")]

decoded = functools.partial(attention, backend="triton_decode")
check = functools.partial(check_attention, decoded, backward=False)

# One share and many, every way of cutting a head, groups beyond one program.
SHAPES = [
    Shape(1, 1, 1, 1, 1, 40),
    Shape(2, 3, 3, 1, 1021, 64),
    Shape(1, 8, 1, 3, 4099, 128),
    Shape(3, 6, 2, 5, 257, 80),
    Shape(1, 32, 8, 1, 8191, 128),
    Shape(1, 16, 1, 16, 1021, 160),
    Shape(67, 8, 8, 1, 509, 64),
    Shape(1, 5, 1, 2, 131, 23),
    Shape(2, 3, 1, 1, 2053, 96),
    Shape(1, 2, 2, 7, 3001, 72),
]
MASKED = [Shape(3, 6, 2, 3, 67, 40), Shape(2, 6, 2, 3, 1031, 64)]


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [*((shape, torch.bfloat16) for shape in SHAPES), *itertools.product(SHAPES[1::3], (torch.float16, torch.float32))],
    ids=str,
)
def test_sizes(shape, dtype):
    call = make_call(shape, dtype, "none", "none", generator_for(SHAPES.index(shape), 3))
    for is_causal in (False, True):
        check(call.query, call.key, call.value, is_causal=is_causal)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", MASKED, ids=str)
def test_masks(shape, dtype):
    for attn_kind, key_kind in (("boolean", "none"), ("none", "gaps"), ("empty-rows", "nothing")):
        call = make_call(shape, dtype, attn_kind, key_kind, generator_for(7))
        masks = {name: None if mask is None else mask.cpu() for name, mask in call.masks.items()}
        allowed = allowed_everywhere(shape, masks["attn_mask"], masks["key_mask"])
        unused = ~used_by_anyone(shape, allowed).to(DEVICE)
        key, value = poisoned(call.key, unused), poisoned(call.value, unused)
        got = check(
            call.query, key, value, attn_mask=call.attn_mask, key_mask=call.key_mask, what=f"{attn_kind} {key_kind}"
        )
        assert not got["output"][~allowed.any(-1).to(DEVICE)].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", MASKED, ids=str)
def test_huge_scores(shape, dtype):
    call = make_call(shape, dtype, "none", "none", generator_for(17))
    check(call.query * 300, call.key, call.value, has_rounded_products=dtype is not torch.float32)


@pytest.mark.parametrize("shape", MASKED, ids=str)
def test_views_and_equal_bits(shape):
    """[B, L, H, D] storage, heads that do not begin at 16 bytes; every run gives the same bits."""
    call = make_call(shape, torch.bfloat16, "none", "gaps", generator_for(29))
    query = call.query.transpose(1, 2).contiguous().transpose(1, 2)
    odd = torch.cat([call.key, call.key[..., :1]], dim=3)[..., 1:]
    tensors = (query, odd, call.value)
    first, second = (decoded(*tensors, key_mask=call.key_mask) for _ in range(2))
    assert torch.equal(first, second)
    dense = decoded(*(tensor.contiguous() for tensor in tensors), key_mask=call.key_mask)
    torch.testing.assert_close(first, dense)


@torch.no_grad()
def test_compiled_and_replayed():
    """A step over a ring of places: inductor keeps the operation, a graph replays it for other positions."""
    shape = Shape(2, 8, 2, 1, 1024, 64)
    call = make_call(shape, torch.bfloat16, "none", "none", generator_for(31))
    position, window = (torch.tensor([number], device=DEVICE) for number in (0, 700))

    def step() -> torch.Tensor:
        return decoded(call.query, call.key, call.value, attn_mask=visible_places(position, window, shape.keys))

    compiled = torch.compile(step, fullgraph=True)
    assert torch.equal(compiled(), step())
    if DEVICE != "cuda":
        return
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = step()
    for number in (0, 5, 699, 1500):
        position.fill_(number)
        graph.replay()
        assert torch.equal(output, step())


@pytest.mark.skipif(DEVICE == "cpu", reason="only for cards")
def test_auto_takes_them_where_they_were_measured():
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("measured on compute capability 9.0 only")
    for num_queries, alone, in_graph in ((1, "sdpa", "sdpa"), (5, "sdpa", "triton_decode"), (67, "sdpa", "sdpa")):
        call = make_call(Shape(2, 8, 2, num_queries, 1021, 64), torch.bfloat16, "none", "right", generator_for(37))
        tensors = (call.query, call.key, call.value)
        assert explain(*tensors).chosen == alone
        with replayed():
            assert explain(*tensors).chosen == in_graph
        position = torch.tensor([700], device=DEVICE)
        masks = {"key_mask": call.key_mask}, {"attn_mask": visible_places(position, position, 1021)}
        for mask in masks:
            assert explain(*tensors, **mask).chosen == ("triton_decode" if num_queries < 9 else "sdpa")
        assert explain(call.query.requires_grad_(), *tensors[1:], key_mask=call.key_mask).chosen == "sdpa"
