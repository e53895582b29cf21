"""Kernels of GroupNorm compiled for real processors without one: nothing is spilt, several fit a processor, and
what walks over pixels asks for them 16 bytes at a time, before it needs them."""

import re

import pytest
import torch

pytest.importorskip("triton")

from mmattn.kernels.launch import is_interpreted
from mmattn.kernels.resources import compiling_for, resources_of
from scripts.gpu.kernel_resources import norm_launches_of
from tests.kernels.test_resources import SHARED_BYTES

pytestmark = [pytest.mark.slow, pytest.mark.skipif(is_interpreted(), reason="nothing is compiled there")]
# Of a processor; there are four programs of 128 threads at least.
REGISTERS, PROGRAMS, WARP = 65536, 4, 32
WALKS = {"norm_moments_kernel": 2, "norm_grad_sums_kernel": 4}
_AHEAD = re.compile(r"\bcp\.async\.c[ag]\.shared\.global .*, (?:0x10|16)[,;]")
_AT_ONCE = re.compile(r"\bld\.global(?:\.\w+)*\.v4\.b32 ")


@pytest.mark.parametrize(
    ("capability", "channels", "dtype"),
    [
        *((90, channels, torch.bfloat16) for channels in (256, 320, 512, 640, 768, 1024, 1280)),
        *((80, channels, torch.bfloat16) for channels in (320, 1280)),
        (90, 320, torch.float32),
        (90, 96, torch.float16),
    ],
    ids=str,
)
def test_resources_are_bounded(capability, channels, dtype):
    with compiling_for(capability):
        for launch in norm_launches_of(channels, dtype):
            name, found = launch.kernel.__name__, resources_of(launch)
            where = f"{name} for capability {capability}, {channels} channels, {dtype}: {found}"
            assert found.spilled_bytes == 0, where
            assert found.registers * launch.num_warps * WARP * PROGRAMS <= REGISTERS, where
            assert found.shared_bytes * PROGRAMS <= SHARED_BYTES[capability], where
            ptx = launch.compile().asm["ptx"]
            if name in WALKS:
                # Those before the walk (two blocks), and those within.
                assert len(_AHEAD.findall(ptx)) >= 3 * WALKS[name], where
            elif name in ("norm_apply_kernel", "norm_grad_kernel"):
                assert len(_AT_ONCE.findall(ptx)) >= 2, where
