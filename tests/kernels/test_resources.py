"""Kernels compiled for real processors without one: what they take is bounded, spills above all."""

import re
from collections import Counter
from importlib.metadata import version

import pytest
import torch
from packaging.version import Version

pytest.importorskip("triton")

from mmattn.kernels.launch import is_interpreted
from mmattn.kernels.resources import compiling_for, resources_of
from scripts.gpu.kernel_resources import launches

pytestmark = [pytest.mark.slow, pytest.mark.skipif(is_interpreted(), reason="nothing is compiled there")]

# What one program may have of a processor, see CUDA's table of compute capabilities.
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
# Where `mmattn.ops.triton_missing` lets them be used.
NEEDS_TRITON = {100: Version("3.9")}
TENSOR_MEMORY_COLUMNS = 512
# A backward that holds the gradients of all keys wants more registers than there are (docs/kernels.md): the most that
# was found, so that it does not get worse unseen.
SPILLED_BYTES = {
    "keys_bwd_kernel": 1400,
    "queries_bwd_kernel": 500,
    "resident_fwd_kernel": 120,
    "resident_maps_kernel": 200,
    "split_bwd_kernel": 350,
    "streamed_fwd_kernel": 32,
    "streamed_maps_kernel": 160,
}
HALF, SINGLE = torch.bfloat16, torch.float32
_FLOAT_INSTRUCTION = re.compile(r"^\s*(?:@\S+ )?(fma|mul|add|sub|max|ex2|lg2|div|rcp)\.[a-z.]*f32\b", re.MULTILINE)


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
        (90, 64, 77, SINGLE),
        (80, 40, 77, HALF),
        (80, 160, 77, HALF),
        (80, 160, 512, HALF),
        (80, 160, 77, SINGLE),
        (100, 64, 77, HALF),
        (100, 160, 512, HALF),
    ],
    ids=str,
)
def test_resources_are_bounded(capability, head_dim, keys, dtype):
    skip_where_refused(capability)
    with compiling_for(capability):
        for launch in launches(head_dim, keys, dtype):
            name, found = launch.kernel.__name__, resources_of(launch)
            where = f"{name} for capability {capability}, head_dim {head_dim}, {keys} keys, {dtype}: {found}"
            # float32 is there to be right, not fast.
            assert dtype is SINGLE or found.spilled_bytes <= SPILLED_BYTES.get(name, 0), where
            assert found.shared_bytes <= SHARED_BYTES[capability], where
            assert found.tensor_memory_columns <= TENSOR_MEMORY_COLUMNS, where
            # The products are matrix instructions, of the widest kind that the processor has.
            if name != "sum_partials_kernel":
                widest = {90: found.warp_group_products, 100: found.tensor_memory_products} if dtype is HALF else {}
                assert widest.get(capability, found.warp_products), where


def skip_where_refused(capability):
    own = version("triton")
    if Version(own) < NEEDS_TRITON.get(capability, Version("0")):
        pytest.skip(f"refused there with triton {own}")


@pytest.mark.parametrize("keys", [77, 300])
@pytest.mark.parametrize("capability", [80, 90])
def test_maps_leave_the_attention_as_it_is(capability, keys):
    """Beside the forward's float instructions there are a subtraction, an exponential, and a product for the scale and
    for the sum, once for each weight; so its output has the same bits."""
    with compiling_for(capability):
        plain, with_maps = (
            Counter(_FLOAT_INSTRUCTION.findall(launch.compile().asm["ptx"])) for launch in launches(64, keys, HALF)[:2]
        )
    added = with_maps - plain
    assert not plain - with_maps
    assert set(added) == {"sub", "ex2", "mul"}
    assert added["sub"] == added["ex2"] == added["mul"] / 2
