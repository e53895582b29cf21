"""What a launch asks of Triton whatever its defaults are."""

import pytest
import torch

pytest.importorskip("triton")

import triton

from mmattn.kernels.launch import is_interpreted
from mmattn.kernels.short_keys_forward import forward_launch
from tests.kernels.faked_card import faked_card


@pytest.mark.skipif(is_interpreted(), reason="nothing is compiled there")
def test_multiply_adds_are_fused_whatever_is_the_default():
    query, key = (torch.zeros(1, 1, length, 24, dtype=torch.float16) for length in (16, 16))
    with faked_card(), triton.knobs.language.scope():
        triton.knobs.language.default_fp_fusion = False
        launch = forward_launch(query, key, key, None, None, 0.3, query, torch.zeros(1, 1, 16))
        for compiled in (launch.run(query.device), launch.compile()):
            assert compiled.metadata.enable_fp_fusion
