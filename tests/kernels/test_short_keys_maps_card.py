"""Attention maps from the forward's own pass on a CUDA card: the plain forward's bits, and weights in float32."""

import itertools

import pytest
import torch

from tests.gpu.card import DEVICE, DTYPES, MARKS, USABLE, make_call
from tests.kernels.cases import FEW_KEYS, MANY_KEYS, SHAPES
from tests.ops.cases import Shape, generator_for

pytest.importorskip("triton")
pytestmark = [*MARKS, pytest.mark.skipif("triton" not in USABLE, reason="the triton backend cannot be used here")]

# Imported here, after the check: they need triton.
from mmattn.kernels.short_keys_maps import short_key_attention_maps  # noqa: E402
from tests.kernels.map_checks import check_maps, keys_of  # noqa: E402

# Of U-Nets, whose configurations are measured ones: several blocks a program, eight warps; and more keys.
UNET = [*(Shape(2, 2, 2, 1031, 77, dim) for dim in (40, 64, 80, 160)), Shape(2, 4, 2, 257, 300, 72), SHAPES[7]]


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [*itertools.product(UNET, (torch.bfloat16,)), *itertools.product(UNET[::3], (torch.float16, torch.float32))],
    ids=str,
)
def test_sizes(shape, dtype):
    call = make_call(shape, dtype, "none", "none", generator_for(UNET.index(shape), 3))
    tensors = (call.query, call.key, call.value)
    keys = keys_of(shape, 11, 5).to(DEVICE)
    first = check_maps(tensors, keys[shape.batch // 2 :], first_row=shape.batch // 2, average=True)
    again = check_maps(tensors, keys[shape.batch // 2 :], first_row=shape.batch // 2, average=True)
    assert torch.equal(first, again)
    everything = torch.arange(shape.keys, device=DEVICE).expand(shape.batch, -1)
    check_maps(tensors, everything, heads=[shape.heads - 1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [FEW_KEYS, MANY_KEYS], ids=str)
def test_masks(shape, dtype):
    for attn_kind, key_kind in (("boolean", "none"), ("none", "gaps"), ("empty-rows", "nothing")):
        call = make_call(shape, dtype, attn_kind, key_kind, generator_for(7))
        check_maps((call.query, call.key, call.value), keys_of(shape, 7, 11).to(DEVICE), **call.masks)


def test_replayed_as_a_graph():
    call = make_call(Shape(2, 8, 8, 1024, 77, 80), torch.bfloat16, "none", "none", generator_for(37))
    keys = torch.tensor([[5, 0, 76]], device=DEVICE)
    arguments = (call.query, call.key, call.value, None, None, 0.1, keys, 1, None, True)
    expected = short_key_attention_maps(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = short_key_attention_maps(*arguments)
    for each in got:
        each.fill_(float("nan"))
    graph.replay()
    for each, wanted in zip(got, expected, strict=True):
        assert torch.equal(each, wanted)
