"""Kernels compiled for real processors without one: what they take is bounded, spills above all."""

import pytest
import torch

pytest.importorskip("triton")

from mmattn.kernels.launch import is_interpreted
from mmattn.kernels.resources import compiling_for, resources_of
from scripts.gpu.kernel_resources import launches

pytestmark = [pytest.mark.slow, pytest.mark.skipif(is_interpreted(), reason="nothing is compiled there")]

# What one program may have of a processor, see CUDA's table of compute capabilities.
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}
# A backward that holds the gradients of all keys wants more registers than there are (docs/kernels.md): the most that
# was found, so that it does not get worse unseen.
SPILLED_BYTES = {"keys_bwd_kernel": 1400, "queries_bwd_kernel": 500, "streamed_fwd_kernel": 32}
HALF, SINGLE = torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    ("capability", "head_dim", "keys", "dtype"),
    [
        (90, 40, 77, HALF),
        (90, 64, 77, HALF),
        (90, 80, 77, HALF),
        (90, 160, 77, HALF),
        (90, 128, 128, HALF),
        (90, 72, 300, HALF),
        (90, 160, 512, HALF),
        (90, 160, 77, SINGLE),
        (80, 40, 77, HALF),
        (80, 160, 77, HALF),
        (80, 160, 512, HALF),
        (80, 160, 77, SINGLE),
    ],
    ids=str,
)
def test_resources_are_bounded(capability, head_dim, keys, dtype):
    with compiling_for(capability):
        for launch in launches(head_dim, keys, dtype):
            name, found = launch.kernel.__name__, resources_of(launch)
            where = f"{name} for capability {capability}, head_dim {head_dim}, {keys} keys, {dtype}: {found}"
            # float32 is there to be right, not fast.
            assert dtype is SINGLE or found.spilled_bytes <= SPILLED_BYTES.get(name, 0), where
            assert found.shared_bytes <= SHARED_BYTES[capability], where
            # The products are matrix instructions, of the widest kind that the processor has.
            if name != "sum_partials_kernel":
                is_group = capability == 90 and dtype is HALF
                assert found.warp_group_products if is_group else found.warp_products, where
