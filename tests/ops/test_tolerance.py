"""The rule itself: it passes what is as good as eager, and fails what is not, saying where."""

import pytest
import torch

from mmattn.ops.attention import attention
from tests.ops.cases import SHAPES, generator_for, make_inputs
from tests.tolerance import check_attention, check_within

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def test_message_has_position_values_and_bound():
    reference = torch.arange(6, dtype=torch.float64).view(2, 3)
    got = reference.float()
    got[1, 0] += 0.5
    with pytest.raises(AssertionError) as failure:
        check_within(got, reference.float(), reference, factor=2.0, what="sdpa: output")
    message = str(failure.value)
    assert "sdpa: output: worst at [1, 0]: got 3.5, reference 3, error 0.5 >" in message
    assert "16.7% of the elements" in message


def test_not_finite_fails_by_itself():
    reference = torch.full((2, 3), float("nan"), dtype=torch.float64)
    with pytest.raises(AssertionError, match=r"not finite at \[0, 0\], 6 of 6"):
        check_within(reference.float(), reference.float(), reference, factor=2.0, what="output")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_wrong_path_fails(dtype):
    query, key, value = make_inputs(SHAPES[1], dtype, generator_for(71))

    def scaled(query, key, value, **arguments):
        """Off by 8 roundings of the scores."""
        return attention(query * (1 + 8 * torch.finfo(dtype).eps), key, value, **arguments) * (
            1 + 8 * torch.finfo(dtype).eps
        )

    with pytest.raises(AssertionError, match="worst at"):
        check_attention(scaled, query, key, value)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["grad of query", "grad of key", "grad of value"])
def test_a_wrong_gradient_fails(dtype, name):
    inputs = dict(zip(("query", "key", "value"), make_inputs(SHAPES[1], dtype, generator_for(73)), strict=True))
    wrong = name.removeprefix("grad of ")

    def function(**tensors):
        tensor = tensors[wrong]
        # Same value, gradient 10 % too large.
        tensors[wrong] = tensor.detach() + 1.1 * (tensor - tensor.detach())
        return attention(**tensors)

    with pytest.raises(AssertionError, match=name):
        check_attention(function, **inputs)
