"""FlexAttention under the same rule. Each kind of call is compiled once, some seconds each: a small grid."""

import functools

import pytest
import torch

from mmattn.errors import BackendError
from mmattn.ops.attention import attention
from mmattn.ops.backends import flex
from tests.ops.cases import SHAPES, generator_for, make_attn_mask, make_inputs, make_key_mask
from tests.tolerance import check_attention

REASON = flex.BACKEND.unusable("cpu")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(REASON is not None, reason=f"flex on a CPU: {REASON}"),
]
CASES = [
    (SHAPES[0], "none", False),
    (SHAPES[3], "nothing", False),
    (SHAPES[4], "none", True),
    (SHAPES[3], "gaps", True),
]


@pytest.mark.parametrize(("shape", "key_kind", "is_causal"), CASES)
def test_masks_on_a_cpu(shape, key_kind, is_causal):
    generator = generator_for(SHAPES.index(shape), 83)
    query, key, value = make_inputs(shape, torch.float32, generator)
    key_mask = make_key_mask(key_kind, shape, generator)
    if key_mask is not None:
        key = key.masked_fill(~key_mask[:, None, :, None], float("nan"))
        value = value.masked_fill(~key_mask[:, None, :, None], float("nan"))
    check_attention(
        functools.partial(attention, backend="flex"),
        query,
        key,
        value,
        key_mask=key_mask,
        is_causal=is_causal,
        backward=False,
        what=f"flex {shape} key {key_kind} causal {is_causal}",
    )


def test_as_many_queries_as_keys_under_a_key_mask():
    torch._dynamo.reset()  # what other lengths were compiled to serves these
    generator = generator_for(7)
    query, key, value = (torch.randn(2, 3, 13, 5, generator=generator) for _ in range(3))
    key_mask = torch.rand(2, 13, generator=generator) > 0.5
    flex_attention = functools.partial(attention, backend="flex")
    check_attention(flex_attention, query, key, value, key_mask=key_mask, backward=False, what="equal lengths")


@pytest.mark.parametrize(("attn_kind", "word"), [("empty-rows", "boolean"), ("bias-heads", "float")])
def test_tables_are_refused_on_a_cpu(attn_kind, word):
    shape = SHAPES[3]
    generator = generator_for(89)
    mask = make_attn_mask(attn_kind, shape, generator)
    with pytest.raises(BackendError, match=rf"{word} mask on cpu \(serves causal, key\)"):
        attention(*make_inputs(shape, torch.float32, generator), attn_mask=mask, backend="flex")


@pytest.mark.parametrize("sizes", [(0, 7, 11), (2, 0, 11), (2, 7, 0)], ids=["no batch", "no queries", "no keys"])
def test_nothing_to_do(sizes):
    batch, queries, keys = sizes
    query, key = torch.randn(batch, 6, queries, 5), torch.randn(batch, 3, keys, 5)
    output = attention(query, key, key, backend="flex")
    assert torch.equal(output, torch.zeros_like(query))


def test_one_tensor_in_several_places():
    """With and without a mask: torch looks for the reason to compile again."""
    query, key = torch.randn(2, 4, 5, 16), torch.randn(2, 2, 7, 16)
    for key_mask, scale in ((None, 0.3), (torch.rand(2, 7) < 0.6, 0.3), (None, 0.7)):
        call = functools.partial(attention, query, key, key, key_mask=key_mask, scale=scale)
        torch.testing.assert_close(call(backend="flex"), call(backend="eager"))
