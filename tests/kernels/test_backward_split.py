"""The experiment with one gradient a program, on Triton's interpreter: against float64 under the tolerance rule."""

import pytest
import torch

from tests.kernels.cases import FEW_KEYS
from tests.ops.cases import Shape, generator_for, make_attn_mask, make_inputs, make_key_mask
from tests.tolerance import check_attention

pytest.importorskip("triton")
pytestmark = pytest.mark.interpreter

# Imported here, after the check: they need triton.
from mmattn.kernels.short_keys import short_key_attention  # noqa: E402
from scripts.gpu.experiments.backward_split_kernel import SplitConfig, split_backward_launches  # noqa: E402


def attention_with(config, launched):
    """The package's forward with the experiment's backward; `launched` is told how many kernels that took."""

    class Attend(torch.autograd.Function):
        @staticmethod
        def forward(ctx, query, key, value, key_mask, attn_mask):
            output, lse = short_key_attention(query, key, value, key_mask, attn_mask, query.shape[3] ** -0.5)
            ctx.save_for_backward(query, key, value, lse, key_mask, attn_mask)
            return output

        @staticmethod
        def backward(ctx, grad_output):
            query, *rest = ctx.saved_tensors
            found = split_backward_launches(grad_output, query, *rest, query.shape[3] ** -0.5, config)
            launched.append(len(found.launches))
            for launch in found.launches:
                launch.run(query.device)
            return found.grad_query, found.grad_key, found.grad_value, None, None

    def attend(query, key, value, *, key_mask=None, attn_mask=None):
        key_mask = None if key_mask is None else key_mask[:, None].expand(-1, key.shape[1], -1)
        return Attend.apply(query, key, value, key_mask, attn_mask)

    return attend


@pytest.mark.parametrize(
    ("shape", "dtype", "config", "launches"),
    [
        (Shape(1, 2, 2, 67, 77, 40), torch.float16, SplitConfig(), 1),
        (Shape(1, 1, 1, 131, 77, 80), torch.float32, SplitConfig(splits=2, are_keys_cut=True), 2),
        (Shape(2, 4, 2, 37, 19, 23), torch.float32, SplitConfig(block_m=16, splits=7, is_head_cut=False), 2),
        (Shape(1, 2, 1, 31, 128, 160), torch.float16, SplitConfig(num_stages=2), 2),
    ],
    ids=str,
)
def test_gradients(shape, dtype, config, launches):
    """One kernel where a program has all queries of a head whose keys are its own, else two."""
    launched = []
    check_attention(attention_with(config, launched), *make_inputs(shape, dtype, generator_for(shape.keys, 3)))
    assert launched == [launches]


def test_masks():
    generator = generator_for(5)
    tensors = make_inputs(FEW_KEYS, torch.float32, generator)
    masks = {
        "attn_mask": make_attn_mask("empty-rows", FEW_KEYS, generator),
        "key_mask": make_key_mask("nothing", FEW_KEYS, generator),
    }
    check_attention(attention_with(SplitConfig(block_m=16, splits=2), []), *tensors, **masks)
