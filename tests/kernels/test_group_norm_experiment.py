"""GroupNorm in channels-last, on Triton's interpreter: against float64 under the tolerance rule."""

import sys

import pytest
import torch
from torch.nn.functional import group_norm, silu

from tests.scripts import SCRIPTS
from tests.tolerance import BACKWARD_FACTOR, FORWARD_FACTOR, check_within

pytest.importorskip("triton")
pytestmark = pytest.mark.interpreter

sys.path.insert(0, str(SCRIPTS / "gpu" / "experiments"))
try:  # after the check: they need triton
    from channels_last_norm import channels_last_group_norm
    from group_norm_kernels import Config, Plan
finally:
    sys.path.remove(str(SCRIPTS / "gpu" / "experiments"))

BLOCKS = Config(16, 32, 4)


def stock(x, weight, bias, shift, groups, has_silu):
    x = x if shift is None else x + shift[:, :, None, None]
    out = group_norm(x, groups, weight, bias, 1e-5)
    return silu(out) if has_silu else out


def draw(*sizes, seed=0):
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(sum(sizes) + seed))


def inputs(sizes, dtype, *, has_shift):
    """x with a mean that is large beside its deviation, as a residual's channels have them."""
    x = (draw(*sizes) + 5 * draw(sizes[1], 1, 1)).to(dtype)
    weight, bias, shift = (draw(*some, seed=1) for some in ((sizes[1],), (sizes[1],), sizes[:2]))
    weight[0] = 0
    tensors = [x, weight.to(dtype), bias.flip(0).to(dtype), shift.to(dtype) if has_shift else None]
    return tensors, (draw(*sizes, seed=2) + 0.5).to(dtype)


def results(function, tensors, cotangent):
    """The output and all gradients."""
    leaves = [None if tensor is None else tensor.detach().requires_grad_() for tensor in tensors]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, [leaf for leaf in leaves if leaf is not None], cotangent)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("sizes", "groups", "has_shift", "has_silu"),
    [
        ((2, 60, 7, 11), 6, True, True),  # blocks of 32 channels cut groups of 10
        ((1, 32, 1, 5), 32, False, True),
        ((3, 66, 13, 3), 1, True, False),
        ((1, 37, 19, 23), 37, False, False),
    ],
    ids=str,
)
def test_output_and_gradients(sizes, groups, has_shift, has_silu, dtype):
    tensors, cotangent = inputs(sizes, dtype, has_shift=has_shift)

    def ours(x, weight, bias, shift=None):
        x = x.contiguous(memory_format=torch.channels_last)
        return channels_last_group_norm(x, weight, bias, groups, shift=shift, has_silu=has_silu, config=BLOCKS)

    def theirs(x, weight, bias, shift=None):
        return stock(x, weight, bias, shift, groups, has_silu)

    exact = results(theirs, [None if each is None else each.double() for each in tensors], cotangent.double())
    found, eager = results(ours, tensors, cotangent), results(theirs, tensors, cotangent)
    for what, got, low, right in zip(("output", "x", "weight", "bias", "shift"), found, eager, exact, strict=False):
        check_within(got, low, right, factor=FORWARD_FACTOR if what == "output" else BACKWARD_FACTOR, what=what)
    assert found[0].is_contiguous(memory_format=torch.channels_last)


def test_pictures_are_shared_out_and_a_last_share_is_shorter():
    plan = Plan.of(torch.empty(1, 7 * 16 + 3, 32), 4, BLOCKS)
    assert (plan.num_shares, plan.per_share) == (8, 16)
    plan = Plan.of(torch.empty(16, 7 * 16 + 3, 32), 4, BLOCKS)
    assert (plan.num_shares, plan.per_share) == (2, 64)


def test_what_does_not_fit_is_refused():
    x, weight = torch.zeros(2, 8, 3, 5), torch.ones(8)
    with pytest.raises(ValueError, match="in channels-last"):
        channels_last_group_norm(x, weight, weight, 2)
    x = x.contiguous(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match="8 channels, 3 groups"):
        channels_last_group_norm(x, weight, weight, 3)
    with pytest.raises(ValueError, match=r"shift \[2, 4\]: give \[2, 8\]"):
        channels_last_group_norm(x, weight, weight, 2, shift=torch.zeros(2, 4))
