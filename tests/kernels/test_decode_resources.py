"""The decode kernels compiled for real processors without one: what they take is bounded."""

import pytest
import torch

pytest.importorskip("triton")

from mmattn.kernels.launch import is_interpreted
from mmattn.kernels.resources import compiling_for, resources_of
from scripts.gpu.kernel_resources import decode_launches_of
from tests.kernels.test_resources import SHARED_BYTES

# What was found with Triton 3.6 at most, in the kernel that adds shares up.
SPILLED_BYTES = 16
pytestmark = [pytest.mark.slow, pytest.mark.skipif(is_interpreted(), reason="nothing is compiled there")]


@pytest.mark.parametrize(
    ("capability", "head_dim", "dtype"),
    [
        *((90, head_dim, torch.bfloat16) for head_dim in (40, 64, 80, 128, 160)),
        *((80, head_dim, torch.bfloat16) for head_dim in (40, 128, 160)),
        (90, 128, torch.float32),
    ],
    ids=str,
)
def test_resources_are_bounded(capability, head_dim, dtype):
    with compiling_for(capability):
        launches = decode_launches_of(head_dim, 4096, dtype)
        assert len(launches) == 2
        for launch in launches:
            name, found = launch.kernel.__name__, resources_of(launch)
            where = f"{name} for capability {capability}, head_dim {head_dim}, {dtype}: {found}"
            assert dtype is torch.float32 or found.spilled_bytes <= SPILLED_BYTES, where
            # Two programs a processor, as keys are shared out for, on cards of capability 9.0.
            assert found.shared_bytes * (2 if capability == 90 else 1) <= SHARED_BYTES[capability], where
            if name == "decode_kernel":
                assert found.warp_products, where
