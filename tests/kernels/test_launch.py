"""How tensors become arguments of kernels, and what a launch asks of Triton whatever its defaults are."""

import pytest
import torch

pytest.importorskip("triton")

import triton

from mmattn.errors import UsageError
from mmattn.kernels.launch import is_interpreted, tensor_arguments
from mmattn.kernels.short_keys_forward import forward_launch
from tests.kernels.faked_card import faked_card


def test_packed_rows_are_a_batch_of_one():
    rows = torch.empty(5, 3, 48, device="meta")[..., :40]
    found = tensor_arguments(8, query=rows, key=rows.transpose(0, 1)[None])
    assert found["query_strides"] == (0, 6, 18, 1)
    assert found["key_strides"][1:] == (6, 18, 1)
    assert found["query_ptr"] is rows


@pytest.mark.parametrize(("num_keys", "is_served"), [(1, True), (77, True), (103, True), (104, False), (4096, False)])
def test_rows_beyond_the_reach_of_offsets_are_refused(num_keys, is_served):
    """A pixel's frames: keys as far apart as a picture is large. Offsets from one pointer have 32 bits."""
    frames = torch.empty(num_keys, 128 * 128, 8, 160, dtype=torch.float16, device="meta")
    for tensor in (frames.permute(1, 2, 0, 3), frames[:, 0]):
        if is_served:
            assert tensor_arguments(8, key=tensor)["key_ptr"] is tensor
        else:
            with pytest.raises(UsageError, match=r"rows of key \[.* lie 20971520 elements apart.*key\.contiguous\(\)"):
                tensor_arguments(8, key=tensor)


@pytest.mark.skipif(is_interpreted(), reason="nothing is compiled there")
def test_multiply_adds_are_fused_whatever_is_the_default():
    query, key = (torch.zeros(1, 1, length, 24, dtype=torch.float16) for length in (16, 16))
    with faked_card(), triton.knobs.language.scope():
        triton.knobs.language.default_fp_fusion = False
        launch = forward_launch(query, key, key, None, None, 0.3, query, torch.zeros(1, 1, 16))
        for compiled in (launch.run(query.device), launch.compile()):
            assert compiled.metadata.enable_fp_fusion
