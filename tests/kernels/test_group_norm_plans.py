"""Remembered launches of GroupNorm: equal to those that Triton makes anew, on a card that is not there."""

import pytest
import torch

pytest.importorskip("triton")

from mmattn.kernels import group_norm as operation
from mmattn.kernels import group_norm_kernels as kernels
from mmattn.kernels.group_norm import group_norm
from mmattn.kernels.launch import is_interpreted
from tests.kernels.faked_card import faked_card
from tests.kernels.norm_cases import laid_out

FORWARD = ("norm_moments_kernel", "norm_groups_kernel", "norm_apply_kernel")
BACKWARD = ("norm_grad_sums_kernel", "norm_group_grads_kernel", "norm_grad_kernel", "norm_parameters_kernel")
# What a call allocates.
OWN = ("out_ptr", "norms_ptr", "moments_ptr", "sums_ptr", "through_ptr", "grad_ptr", "grad_x_ptr", "grad_weight_ptr",
       "grad_bias_ptr", "grad_shift_ptr")  # fmt: skip
pytestmark = pytest.mark.skipif(is_interpreted(), reason="nothing is compiled there")


@pytest.fixture
def launched(monkeypatch):
    """What was launched, in order; nothing is planned yet."""
    forget(monkeypatch)
    with faked_card() as launched:
        yield launched


def forget(monkeypatch):
    for plans in (operation._FORWARD, operation._BACKWARD):
        monkeypatch.setattr(plans, "plans", {})


def batch_of(channels, *, has_shift=True, weight_dtype=torch.float32, wanted=(True, True, True)):
    x = laid_out(torch.zeros(2, channels, 5, 7, dtype=torch.float16)).requires_grad_(wanted[0])
    weight, bias = (torch.zeros(channels, dtype=weight_dtype, requires_grad=wanted[1]) for _ in range(2))
    shift = torch.zeros(2, channels, dtype=torch.float16, requires_grad=wanted[2]) if has_shift else None
    return x, weight, bias, shift


def run(launched, tensors, *, groups=4, eps=1e-5, has_silu=True):
    """(kernel, programs, arguments by name) of each launch, tensors as addresses."""
    launched.clear()
    output = group_norm(*tensors, groups, eps, has_silu)
    leaves = [each for each in tensors if each is not None and each.requires_grad]
    torch.autograd.grad(output, leaves, torch.zeros_like(output))
    found = []
    for name, programs, arguments in launched:
        numbers = [each.data_ptr() if isinstance(each, torch.Tensor) else each for each in arguments]
        found.append((name, programs, dict(zip(getattr(kernels, name).arg_names, numbers, strict=True))))
    return found


def test_planned_launches_are_those_that_triton_makes(launched, monkeypatch):
    """Of calls that differ in any one thing."""
    calls = [
        (batch_of(32), {}),
        (batch_of(32), {"eps": 1e-6}),
        (batch_of(32), {"groups": 8}),
        (batch_of(32), {"has_silu": False}),
        (batch_of(64), {}),
        (batch_of(32, has_shift=False), {}),
        (batch_of(32, weight_dtype=torch.float16), {}),
        (batch_of(32, wanted=(True, False, True)), {}),
        (batch_of(32, wanted=(True, True, False)), {}),
        (batch_of(32, wanted=(False, True, False)), {}),
    ]
    first = [run(launched, tensors, **options) for tensors, options in calls]
    assert len(operation._FORWARD.plans) == 7
    assert len(operation._BACKWARD.plans) == 8  # of another eps, and of a shift that nobody wants, nothing new
    planned = [run(launched, tensors, **options) for tensors, options in calls]
    for (tensors, options), launches, before in zip(calls, planned, first, strict=True):
        forget(monkeypatch)
        anew = run(launched, tensors, **options)
        for found in (launches, before):
            assert without_own(found) == without_own(anew)
        names = [name for name, _, _ in launches]
        assert names[:3] == list(FORWARD)
        assert set(names[3:]) <= set(BACKWARD)


def without_own(launches):
    return [(name, programs, {k: v for k, v in found.items() if k not in OWN}) for name, programs, found in launches]


def test_only_what_is_wanted_is_launched(launched):
    def names(*wanted):
        return [name for name, _, _ in run(launched, batch_of(32, wanted=wanted))][3:]

    assert names(True, True, True) == list(BACKWARD)
    assert names(True, False, False) == list(BACKWARD[:3])
    assert names(False, True, False) == [BACKWARD[0], BACKWARD[3]]
    assert names(False, False, True) == list(BACKWARD[:2])


def test_kernels_hand_on_what_they_wrote(launched):
    tensors = batch_of(32)
    for _ in range(2):
        moments, groups, apply, sums, of_groups, grad, parameters = (each for _, _, each in run(launched, tensors))
        assert moments["moments_ptr"] == groups["moments_ptr"]
        norms = {each["norms_ptr"] for each in (groups, apply, sums, of_groups, grad)}
        assert len(norms) == 1
        assert sums["sums_ptr"] == of_groups["sums_ptr"] == parameters["sums_ptr"]
        assert of_groups["through_ptr"] == grad["through_ptr"]
        written = [
            grad["grad_x_ptr"],
            of_groups["grad_shift_ptr"],
            *(parameters[f"grad_{k}_ptr"] for k in ("weight", "bias")),
        ]
        assert len({*written, apply["out_ptr"], *norms}) == 6
