"""The kernels of gated feed-forward blocks compiled for real processors without one, and launched on one that is not
there."""

import re

import pytest
import torch

pytest.importorskip("triton")

from mmattn.kernels import gated as operations
from mmattn.kernels.launch import is_interpreted
from mmattn.kernels.resources import compiling_for, resources_of
from scripts.gpu.kernel_resources import gated_launches_of
from tests.kernels.faked_card import faked_card

REGISTERS = 40  # 48 warps of a processor
pytestmark = pytest.mark.skipif(is_interpreted(), reason="nothing is compiled there")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "width", "dtype"),
    [
        *((capability, width, torch.bfloat16) for capability in (80, 90) for width in (1280, 2048)),
        (90, 320, torch.float16),
        (90, 2048, torch.float32),
    ],
    ids=str,
)
def test_nothing_is_spilt_and_threads_move_16_bytes(capability, width, dtype):
    with compiling_for(capability):
        for activation in ("gelu", "silu"):
            for launch, accesses in zip(gated_launches_of(width, dtype, activation), (3, 5), strict=True):
                found = resources_of(launch)
                where = (
                    f"{launch.kernel.__name__} ({activation}) for capability {capability}, {width}, {dtype}: {found}"
                )
                assert found.spilled_bytes == 0, where
                assert found.shared_bytes == 0, where
                assert found.registers <= REGISTERS, where
                moved = re.findall(r"\b(?:ld|st)\.global\S*", launch.compile().asm["ptx"])
                assert len(moved) == accesses, where
                assert all(".v4.b32" in each for each in moved), where


@pytest.mark.slow
def test_odd_widths_are_compiled_too():
    with compiling_for(90):
        for launch in gated_launches_of(37, torch.bfloat16, "gelu"):
            assert resources_of(launch).spilled_bytes == 0


@pytest.mark.parametrize("activation", ["gelu", "silu"])
def test_planned_launches_are_those_that_triton_makes(activation, monkeypatch):
    """Of other rows than the first call's as well."""
    for plans in (operations._FORWARD, operations._BACKWARD):
        monkeypatch.setattr(plans, "plans", {})

    def run(launched, rows):
        launched.clear()
        joined = torch.zeros(rows, 2 * 64, dtype=torch.float16)
        output = operations.product(joined, activation)
        gradient = operations.gradient(output, joined, activation)
        places = {each.data_ptr(): name for name, each in (("x", joined), ("y", output), ("dx", gradient))}
        addresses = [[places.get(address(each), each) for each in arguments] for _, _, arguments in launched]
        return [(name, programs) for name, programs, _ in launched], addresses

    with faked_card() as launched:
        first = [run(launched, rows) for rows in (5, 160)]
        assert len(operations._FORWARD.plans) == len(operations._BACKWARD.plans) == 2
        assert [run(launched, rows) for rows in (5, 160)] == first
    names, addresses = first[0]
    assert [name for name, _ in names] == ["gated_fwd_kernel", "gated_bwd_kernel"]
    assert [arguments[:2] for arguments in addresses] == [["x", "y"], ["y", "x"]]
    assert addresses[1][2] == "dx"


def address(argument):
    return argument.data_ptr() if isinstance(argument, torch.Tensor) else argument
