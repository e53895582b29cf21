"""The kernels for packed rows compiled for real processors without one: nothing is spilt on compute capability 9.0 by
heads of up to 128."""

import pytest
import torch

pytest.importorskip("triton")

from mmattn.kernels.launch import is_interpreted
from mmattn.kernels.resources import compiling_for, resources_of
from scripts.gpu.kernel_resources import packed_launches_of
from tests.kernels.test_resources import SHARED_BYTES, TENSOR_MEMORY_COLUMNS, skip_where_refused

# What was found with Triton 3.9 at most, in the kernel that holds gradients of keys and values.
SPILLED_BYTES = 160
pytestmark = [pytest.mark.slow, pytest.mark.skipif(is_interpreted(), reason="nothing is compiled there")]


@pytest.mark.parametrize(
    ("capability", "head_dim", "dtype"),
    [
        *((90, head_dim, torch.bfloat16) for head_dim in (32, 40, 64, 80, 96, 128, 160)),
        *((80, head_dim, torch.bfloat16) for head_dim in (40, 64, 128)),
        (90, 64, torch.float32),
        (100, 64, torch.bfloat16),
    ],
    ids=str,
)
def test_resources_are_bounded(capability, head_dim, dtype):
    skip_where_refused(capability)
    with compiling_for(capability):
        for launch in packed_launches_of(head_dim, dtype):
            found = resources_of(launch)
            where = f"{launch.kernel.__name__} for capability {capability}, head_dim {head_dim}, {dtype}: {found}"
            # float32 is there to be right, not fast.
            most = 0 if (capability, head_dim > 128) == (90, False) else SPILLED_BYTES
            assert dtype is torch.float32 or found.spilled_bytes <= most, where
            # Two programs a processor on cards of capability 9.0.
            assert found.shared_bytes * (2 if capability == 90 else 1) <= SHARED_BYTES[capability], where
            assert found.tensor_memory_columns <= TENSOR_MEMORY_COLUMNS, where
            assert found.warp_group_products or found.warp_products or found.tensor_memory_products, where
