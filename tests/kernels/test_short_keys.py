"""The short-key kernels on Triton's interpreter, against the float64 specification under the tolerance rule."""

import pytest
import torch

from mmattn.errors import BackendError
from mmattn.ops.attention import attention
from tests.kernels.cases import FEW_KEYS, GROUPED, MANY_KEYS, SHAPES, poisoned, triton_attention
from tests.ops.cases import (
    allowed_everywhere,
    generator_for,
    make_attn_mask,
    make_inputs,
    make_key_mask,
    used_by_anyone,
)
from tests.tolerance import check_attention

pytest.importorskip("triton")
pytestmark = pytest.mark.interpreter

HALF_OR_SINGLE = (torch.float16, torch.float32)
MASKS = [("boolean", "none"), ("none", "gaps"), ("empty-rows", "nothing"), ("boolean-heads", "all")]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sizes(shape):
    # One type a shape, the rest the other way round: each path is run in both.
    dtype = HALF_OR_SINGLE[SHAPES.index(shape) % 2]
    check_attention(triton_attention, *make_inputs(shape, dtype, generator_for(SHAPES.index(shape), 3)))


@pytest.mark.parametrize("shape", GROUPED, ids=str)
def test_grouped_heads_and_both_masks(shape):
    generator = generator_for(GROUPED.index(shape), 5)
    query, key, value = make_inputs(shape, torch.float32, generator)
    attn_mask = make_attn_mask("boolean-heads", shape, generator)
    key_mask = make_key_mask("right", shape, generator)
    check_attention(triton_attention, query, key, value, attn_mask=attn_mask, key_mask=key_mask)


@pytest.mark.parametrize(("attn_kind", "key_kind"), MASKS)
@pytest.mark.parametrize("shape", [FEW_KEYS, MANY_KEYS], ids=str)
def test_masked_keys_have_no_influence(shape, attn_kind, key_kind):
    """NaN in them reaches nothing, rows without keys give zeros, and zero gradients."""
    generator = generator_for(MASKS.index((attn_kind, key_kind)), 7)
    query, key, value = make_inputs(shape, torch.float16, generator)
    attn_mask, key_mask = make_attn_mask(attn_kind, shape, generator), make_key_mask(key_kind, shape, generator)
    allowed = allowed_everywhere(shape, attn_mask, key_mask)
    unused = ~used_by_anyone(shape, allowed)
    key, value = poisoned(key, unused), poisoned(value, unused)
    got = check_attention(triton_attention, query, key, value, attn_mask=attn_mask, key_mask=key_mask)
    empty = ~allowed.any(-1)
    assert empty.any() or attn_kind == "boolean" or key_kind == "gaps"
    assert not got["output"][empty].any()
    assert not got["grad of query"][empty].any()
    assert not got["grad of key"][unused].any()
    assert not got["grad of value"][unused].any()


@pytest.mark.parametrize(
    ("axes", "used"), [((2, 1, 1), "per key"), ((1, 1, 17), "per query"), ((2, 3, 1), "per head and key")]
)
def test_axes_of_size_one(axes, used):
    shape = FEW_KEYS
    batch, heads, queries = axes
    mask = torch.rand(batch, heads, queries, shape.keys, generator=generator_for(11)) < 0.6
    query, key, value = make_inputs(shape, torch.float32, generator_for(13))
    check_attention(triton_attention, query, key, value, attn_mask=mask, what=used)


@pytest.mark.parametrize("factor", [30.0, 3000.0])
@pytest.mark.parametrize("shape", [FEW_KEYS, MANY_KEYS], ids=str)
def test_huge_scores(shape, factor):
    query, key, value = make_inputs(shape, torch.float32, generator_for(17))
    check_attention(triton_attention, query * factor, key, value)


@pytest.mark.parametrize("shape", [FEW_KEYS, MANY_KEYS], ids=str)
def test_strongly_negative_scores(shape):
    """Every log-sum-exp below -100."""
    generator = generator_for(19)
    query, key, value = make_inputs(shape, torch.float16, generator)
    mask = make_attn_mask("boolean", shape, generator)
    query, key = query.abs() + 4, -(key.abs() + 4)
    check_attention(triton_attention, query, key, value, attn_mask=mask, scale=1.0, has_rounded_products=True)


def test_negative_and_zero_scale():
    query, key, value = make_inputs(FEW_KEYS, torch.float32, generator_for(23))
    for scale in (-0.3, 0.0):
        check_attention(triton_attention, query, key, value, scale=scale)


@pytest.mark.parametrize("shape", [FEW_KEYS, MANY_KEYS], ids=str)
def test_views(shape):
    """[B, L, H, D] storage, a cache's front part, values with other strides, an expanded gradient."""
    query, key, value = make_inputs(shape, torch.float32, generator_for(29))
    query = query.transpose(1, 2).contiguous().transpose(1, 2)
    key = torch.cat([key, torch.full_like(key, float("nan"))], dim=2)[:, :, : shape.keys]
    value = value.transpose(2, 3).contiguous().transpose(2, 3)
    views = [tensor.requires_grad_() for tensor in (query, key, value)]
    dense = [tensor.detach().contiguous().requires_grad_() for tensor in views]
    output = triton_attention(*views)
    expected = triton_attention(*dense)
    assert output.stride() == query.stride()
    assert torch.equal(output, expected)
    output.sum().backward()
    expected.sum().backward()
    for got, wanted in zip(views, dense, strict=True):
        torch.testing.assert_close(got.grad, wanted.grad)


@pytest.mark.parametrize("sizes", [(0, 7, 11), (2, 0, 11), (2, 7, 0)], ids=["no batch", "no queries", "no keys"])
def test_nothing_to_do(sizes):
    batch, queries, keys = sizes
    query = torch.randn(batch, 6, queries, 5, requires_grad=True)
    key = torch.randn(batch, 3, keys, 5, requires_grad=True)
    output = triton_attention(query, key, key)
    output.sum().backward()
    assert torch.equal(output, torch.zeros_like(query))
    assert torch.equal(query.grad, torch.zeros_like(query))
    assert torch.equal(key.grad, torch.zeros_like(key))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"keys": 513}, r"513 keys \(serves at most 512\)"),
        ({"head_dim": 161}, r"head_dim 161 \(serves 1 to 160\)"),
        ({"is_causal": True}, r"causal mask on cpu \(serves key, boolean\)"),
        ({"attn_mask": torch.zeros(2, 1)}, r"float mask on cpu \(serves key, boolean\)"),
        ({"dropout_p": 0.1}, "dropout"),
        ({"return_weights": True}, "returning the weights"),
        ({"dtype": torch.bfloat16}, r"dtype bfloat16 on cpu \(serves float32, float16\)"),
    ],
)
def test_refusals(arguments, reason):
    sizes = {name: arguments.pop(name, default) for name, default in (("keys", 3), ("head_dim", 8))}
    dtype = arguments.pop("dtype", torch.float32)
    query = torch.zeros(1, 1, 2, sizes["head_dim"], dtype=dtype)
    key = torch.zeros(1, 1, sizes["keys"], sizes["head_dim"], dtype=dtype)
    with pytest.raises(BackendError, match=f"'triton' cannot serve this call: {reason}"):
        attention(query, key, key, backend="triton", **arguments)
