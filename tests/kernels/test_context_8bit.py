"""Attention to keys and values in 8 bits (scripts/gpu/experiments) on Triton's interpreter.

The kernels are held to float64 attention over what the 8 bits say, by the tolerance rule. What rounding to 8 bits does
is held to its own bound.
"""

import pytest
import torch

from mmattn.ops.attention import attention
from mmattn.ops.tolerance import FORWARD_FACTOR
from tests.ops.cases import Shape, generator_for, make_inputs
from tests.tolerance import check_within

pytest.importorskip("triton")
pytestmark = pytest.mark.interpreter

from scripts.gpu.experiments.context_8bit_kernels import (  # noqa: E402
    attend_8bit,
    in_8_bits,
    launches_8bit,
    resident_8bit_kernel,
    walk_8bit_kernel,
)

FORMATS = [(torch.int8, "channel"), (torch.int8, "key"), (torch.float8_e4m3fn, "channel"), (torch.float8_e4m3fn, "key")]
PAIRS = [FORMATS[::3], FORMATS[1:3]]
# One query and folded ones; one share of the keys and several; all keys held, and more queries than a block.
SHAPES = [
    (Shape(2, 6, 2, 1, 29, 40), walk_8bit_kernel, 1),
    (Shape(1, 4, 2, 3, 577, 64), walk_8bit_kernel, 2),
    (Shape(1, 2, 1, 67, 77, 72), resident_8bit_kernel, 1),
    (Shape(1, 2, 2, 67, 293, 23), walk_8bit_kernel, 2),
]
# Of every other shape one half of the formats: each kernel has both kinds of scales and both types of 8 bits.
CASES = [(*shape, *kind) for number, shape in enumerate(SHAPES) for kind in PAIRS[number % 2]]
SCALE = 0.2


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[3]}-{case[4]}")
def test_kernels_against_float64(case):
    """Of what the 8 bits say, by the tolerance rule."""
    shape, kernel, count, dtype, per = case
    number = CASES.index(case)
    # In float32 no program holds so many keys.
    is_half = kernel is resident_8bit_kernel or (number + number // 2) % 2 == 0
    query, key, value = make_inputs(shape, torch.float16 if is_half else torch.float32, generator_for(number, 97))
    context = in_8_bits(3 * key, value / 5, dtype, per)
    if is_half:
        launches = launches_8bit(query, context, SCALE, query)
        assert (launches[0].kernel, len(launches)) == (kernel, count)
        for launch in launches:  # the interpreter passes by what a compiled kernel would not take
            assert launch.arguments.keys() == set(launch.kernel.arg_names)
    eager = attention(query, *context.widened(query.dtype), scale=SCALE, backend="eager")
    reference = attention(query.double(), *context.widened(torch.float64), scale=SCALE, backend="eager")
    check_within(attend_8bit(query, context, SCALE), eager, reference, factor=FORWARD_FACTOR, what="8 bits")


@pytest.mark.parametrize(("dtype", "per"), FORMATS, ids=str)
def test_what_rounding_to_8_bits_costs(dtype, per):
    """Against float64 attention of what was rounded: a score s moves by at most d = scale * sum(|query| * moved key), a
    weight by at most the factor exp(2 d), a value by at most half a step."""
    shape = Shape(2, 4, 2, 3, 293, 40)
    query, key, value = make_inputs(shape, torch.float32, generator_for(101))
    context = in_8_bits(key, value, dtype, per)
    key_moved, value_moved = (
        half_step(given, context, scales)
        for given, scales in ((key, context.key_scales), (value, context.value_scales))
    )
    for given, got, most in zip((key, value), context.widened(torch.float64), (key_moved, value_moved), strict=True):
        assert ((given.double() - got).abs() <= most).all()
    moved = SCALE * (query.double().abs() @ key_moved.repeat_interleave(2, dim=1).mT).amax(-1, keepdim=True)
    bound = value_moved.amax() + (moved.mul(2).exp() - 1) * value.abs().amax()
    exact = attention(query.double(), key.double(), value.double(), scale=SCALE, backend="eager")
    error = (attend_8bit(query, context, SCALE) - exact).abs()
    assert (error <= bound).all()
    assert error.amax() < 0.1 * exact.abs().amax()


def half_step(given, context, scales):
    """How far rounding moves a number at most: half a step; in float8 a sixteenth of it, or half the least step."""
    scales = scales.double().unsqueeze(context.axis) * (1 + 1e-6)
    if context.key.dtype is torch.int8:
        return (scales / 2).expand_as(given)
    return torch.maximum(given.double().abs() / 16, scales * 2.0**-10)


def test_a_channel_of_zeros_and_a_wrong_word():
    key = torch.randn(1, 1, 7, 5)
    key[..., 2] = 0
    assert in_8_bits(key, key, torch.int8, "channel").widened(torch.float32)[0][..., 2].eq(0).all()
    with pytest.raises(ValueError, match="a scale per 'head': there is one per channel or per key"):
        in_8_bits(key, key, torch.int8, "head")
