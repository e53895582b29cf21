"""Backends for rows without padding on a card: padded and packed calls under the tolerance rule, and what they cost."""

from __future__ import annotations

import functools

import pytest
import torch

from mmattn.ops.attention import attention
from mmattn.ops.backends import flash, varlen
from mmattn.ops.packed import packed_attention
from mmattn.ops.segments import Segments
from tests.gpu.card import DEVICE, HALF_TYPES, MARKS, make_call
from tests.ops.cases import KEY_MASKS, Shape, generator_for
from tests.tolerance import check_attention

REASONS = {row.name: row.unusable("cuda") for row in (varlen.BACKEND, flash.BACKEND)}
NAMES = [
    pytest.param(name, marks=pytest.mark.skipif(DEVICE != "cuda" or reason is not None, reason=f"{name}: {reason}"))
    for name, reason in REASONS.items()
]
pytestmark = [*MARKS, pytest.mark.parametrize("name", NAMES)]

HEAD_DIMS = (8, 40, 64, 72, 80, 96, 128, 160, 256)
SHAPES = [
    *(Shape(2, 4, 2, 67, 131, head_dim) for head_dim in HEAD_DIMS),
    Shape(3, 6, 1, 33, 77, 64),
    Shape(2, 8, 8, 129, 77, 40),
    Shape(5, 6, 2, 1, 19, 64),
    Shape(2, 3, 3, 77, 31, 88),
]


@pytest.mark.parametrize("dtype", HALF_TYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_masks(name, shape, dtype):
    number = SHAPES.index(shape)
    cases = [(kind, False) for kind in KEY_MASKS[number % 3 :: 3]] + [("none", True), ("nothing", False)]
    for kind, is_causal in cases:
        call = make_call(shape, dtype, "none", kind, generator_for(number, 5))
        check_attention(
            functools.partial(attention, backend=name),
            call.query,
            call.key,
            call.value,
            key_mask=call.key_mask,
            is_causal=is_causal,
            what=f"{name} {dtype} {shape} key {kind} causal {is_causal}",
        )


@pytest.mark.parametrize("dtype", HALF_TYPES, ids=str)
@pytest.mark.parametrize("kind", ["right", "gaps", "nothing", "all"])
def test_rows_without_keys_and_keys_without_readers_give_exactly_nothing(name, kind, dtype):
    shape = SHAPES[3]
    call = make_call(shape, dtype, "none", kind, generator_for(11))
    assert call.key_mask is not None
    unused = ~call.key_mask[:, None, :, None]
    poisoned = (tensor.masked_fill(unused, float("nan")) for tensor in (call.key, call.value))
    query, key, value = (tensor.requires_grad_() for tensor in (call.query, *poisoned))
    output = attention(query, key, value, key_mask=call.key_mask, backend=name)
    output.float().square().sum().backward()
    empty = ~call.key_mask.any(1)
    for tensor in (output, query.grad, key.grad, value.grad):
        assert tensor is not None
        assert tensor.isfinite().all()
        assert not tensor[empty].any()
    for grad in (key.grad, value.grad):
        assert not grad.masked_select(unused).any()


@pytest.mark.parametrize("dtype", HALF_TYPES, ids=str)
@pytest.mark.parametrize(("kv_heads", "is_causal"), [(6, False), (2, True), (1, False)])
def test_packed(name, kv_heads, is_causal, dtype):
    """Each sequence as by eager alone, in float64 and in its own dtype."""
    queries, keys = [1, 67, 13, 129], [19, 67, 131, 300]
    generator = generator_for(17)
    sizes = ((sum(queries), 6), (sum(keys), kv_heads), (sum(keys), kv_heads))
    rows = [torch.randn(*size, 72, generator=generator).to(DEVICE, dtype) for size in sizes]

    segments = (Segments.of(queries, DEVICE), Segments.of(keys, DEVICE))

    def packed(query, key, value, attn_mask):
        """As `check_attention` calls it: a batch of one, and the mask for eager."""
        own = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
        return packed_attention(*own, *segments, is_causal=is_causal, backend=name).transpose(0, 1)[None]

    blocks = [torch.ones(q, k).tril(k - q if is_causal else k) for q, k in zip(queries, keys, strict=True)]
    check_attention(
        packed,
        *(tensor.transpose(0, 1)[None] for tensor in rows),
        attn_mask=torch.block_diag(*blocks).bool().to(DEVICE),
        what=f"{name} packed {dtype} {kv_heads} causal {is_causal}",
    )


def test_nobody_waits_for_the_card(name):
    """A CUDA graph takes the call in, mask and all, and follows when the mask changes."""
    call = make_call(SHAPES[3], torch.bfloat16, "none", "gaps", generator_for(19))
    assert call.key_mask is not None
    tensors = (call.query, call.key, call.value)
    attend = functools.partial(attention, *tensors, key_mask=call.key_mask, backend=name)
    attend()  # what is found out once may wait
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        attend()
    finally:
        torch.cuda.set_sync_debug_mode(before)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        attend()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = attend()
    call.key_mask.logical_not_()
    graph.replay()
    assert torch.equal(output, attend())


def test_compiled_into_one_graph(name):
    if name == "flash":
        pytest.skip("flash-attn's own operator decides whether it can be compiled")
    call = make_call(SHAPES[3], torch.bfloat16, "none", "right", generator_for(23))
    tensors = tuple(tensor.requires_grad_() for tensor in (call.query, call.key, call.value))
    function = functools.partial(attention, key_mask=call.key_mask, backend=name)
    results = []
    for run in (torch.compile(function, fullgraph=True), function):
        output = run(*tensors)
        results.append((output, *torch.autograd.grad(output.float().square().sum(), tensors)))
    for part, got, want in zip(("output", "grad of query", "grad of key", "grad of value"), *results, strict=True):
        # A gradient of zeros only is one that torch lost (pytorch issue 180642).
        counts = f"elements that are not zero: {int(got.count_nonzero())}, uncompiled {int(want.count_nonzero())}"
        torch.testing.assert_close(got, want, msg=lambda text, what=f"{part}: {counts}": f"{what}\n{text}")
