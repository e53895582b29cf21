"""The kernel that adds pictures and a bias, compiled for real processors without one."""

import re

import pytest
import torch

pytest.importorskip("triton")

from mmattn.kernels.launch import is_interpreted
from mmattn.kernels.resources import compiling_for, resources_of
from scripts.gpu.kernel_resources import biased_sum_launch_of

pytestmark = pytest.mark.skipif(is_interpreted(), reason="nothing is compiled there")


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("channels", [256, 320])
def test_nothing_is_spilt_and_threads_move_16_bytes(capability, channels):
    with compiling_for(capability):
        launch = biased_sum_launch_of(channels, torch.bfloat16)
        found = resources_of(launch)
        assert (found.spilled_bytes, found.shared_bytes) == (0, 0)
        assert found.registers <= 40
        moved = re.findall(r"\b(?:ld|st)\.global\S*", launch.compile().asm["ptx"])
        assert len(moved) == 10
        assert all(".v4.b32" in each for each in moved)
