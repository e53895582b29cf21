"""The kernels as operations of torch: fake and autograd rules, compiled graphs, log-sum-exp, configurations."""

import dataclasses

import pytest
import torch

from tests.kernels.cases import FEW_KEYS, MANY_KEYS, triton_attention
from tests.ops.cases import Shape, generator_for, make_attn_mask, make_inputs, make_key_mask
from tests.tolerance import check_attention

pytest.importorskip("triton")
pytestmark = pytest.mark.interpreter

# Imported here, after the check: they need triton.
from mmattn.kernels import short_keys_backward, short_keys_forward  # noqa: E402
from mmattn.kernels.launch import Card  # noqa: E402
from mmattn.kernels.short_keys import short_key_attention, short_key_attention_backward  # noqa: E402
from mmattn.kernels.short_keys_backward_split import split_launches  # noqa: E402
from mmattn.kernels.short_keys_configs import (  # noqa: E402
    BackwardConfig,
    ForwardConfig,
    SplitConfig,
    backward_config,
)


def inputs_of(shape, has_grad=False):
    generator = generator_for(3)
    tensors = make_inputs(shape, torch.float32, generator)
    key_mask = make_key_mask("gaps", shape, generator)
    assert key_mask is not None
    return [tensor.requires_grad_(has_grad) for tensor in tensors], key_mask[:, None]


def test_opcheck():
    shape = dataclasses.replace(FEW_KEYS, batch=1, heads=2, kv_heads=1, keys=13)
    tensors, key_mask = inputs_of(shape, has_grad=True)
    views = [tensor.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for tensor in tensors]
    mask = torch.rand(1, 2, shape.queries, shape.keys) < 0.7
    for arguments in ((*tensors, None, None, 0.3), (*views, key_mask, mask, 0.3)):
        torch.library.opcheck(short_key_attention, arguments)
    detached = [tensor.detach() for tensor in views]
    output, lse = short_key_attention(*detached, key_mask, mask, 0.3)
    torch.library.opcheck(short_key_attention_backward, (output, *detached, output, lse, key_mask, mask, 0.3))


@pytest.mark.parametrize("shape", [FEW_KEYS, MANY_KEYS], ids=str)
def test_log_sum_exp(shape):
    (query, key, value), key_mask = inputs_of(shape)
    key_mask[0] = False
    _, lse = short_key_attention(query, key, value, key_mask, None, 0.3)
    key = key.repeat_interleave(shape.heads // shape.kv_heads, dim=1)
    scores = 0.3 * query.double() @ key.double().transpose(-1, -2)
    expected = scores.masked_fill(~key_mask[:, :, None], float("-inf")).logsumexp(-1)
    assert (lse[0] == float("-inf")).all()
    torch.testing.assert_close(lse, expected.float())


def test_gradients_flow_through_the_output_only():
    (query, key, value), key_mask = inputs_of(FEW_KEYS, has_grad=True)
    output, lse = short_key_attention(query, key, value, key_mask, None, 0.3)
    assert output.requires_grad
    assert not lse.requires_grad


@pytest.mark.parametrize("shape", [FEW_KEYS, MANY_KEYS], ids=str)
def test_compiled_whole(shape):
    """One graph, forward and backward, that keeps the operation."""
    tensors, key_mask = inputs_of(shape, has_grad=True)
    arguments = {"key_mask": key_mask[:, 0], "attn_mask": torch.rand(shape.queries, shape.keys) < 0.7}
    expected = triton_attention(*tensors, **arguments)
    wanted = torch.autograd.grad(expected.square().sum(), tensors)
    compiled = torch.compile(triton_attention, fullgraph=True, backend="aot_eager")
    output = compiled(*tensors, **arguments)
    assert torch.equal(output, expected)
    for got, grad in zip(torch.autograd.grad(output.square().sum(), tensors), wanted, strict=True):
        assert torch.equal(got, grad)


CONFIGS = [
    (ForwardConfig(16, 4), BackwardConfig(16, 128, 0.1)),
    (ForwardConfig(64, 2, is_head_cut=False, are_keys_cut=False), BackwardConfig(64, 64, 9.0, 4, 1, False, False)),
]


@pytest.mark.parametrize(("forward", "backward"), CONFIGS, ids=["small blocks", "padded"])
@pytest.mark.parametrize("shape", [FEW_KEYS, MANY_KEYS], ids=str)
def test_every_configuration_computes_the_same(monkeypatch, shape, forward, backward):
    """Several blocks a program, one split and many, blocks beyond the queries, sizes cut and padded."""
    monkeypatch.setattr(short_keys_forward, "forward_config", lambda *_: forward)
    monkeypatch.setattr(short_keys_backward, "backward_config", lambda *_: backward)
    tensors, key_mask = inputs_of(dataclasses.replace(shape, queries=37))
    check_attention(triton_attention, *tensors, key_mask=key_mask[:, 0])


@pytest.mark.parametrize(
    ("shape", "dtype", "config", "row_blocks", "splits"),
    [
        (Shape(1, 2, 2, 67, 77, 40), torch.float16, SplitConfig(64, 1.0, 4), 2, 1),
        (Shape(1, 1, 1, 131, 77, 80), torch.float32, SplitConfig(64, 9.0, 4), 1, 3),
        (Shape(2, 4, 2, 37, 19, 23), torch.float32, SplitConfig(16, 1.0), 2, 2),
        (Shape(1, 2, 1, 31, 128, 160), torch.float16, SplitConfig(32, 1.0, num_stages=2), 1, 1),
    ],
    ids=str,
)
def test_one_gradient_a_program(monkeypatch, shape, dtype, config, row_blocks, splits):
    """Programs that walk over all queries of a head, with keys of their own and shared by two, and over some."""
    monkeypatch.setattr(short_keys_backward, "backward_config", lambda *_: config)
    found = []
    monkeypatch.setattr(
        short_keys_backward, "split_launches", lambda *arguments: found.append(split_launches(*arguments)) or found[-1]
    )
    tensors = make_inputs(shape, dtype, generator_for(shape.keys, 3))
    masks = {"key_mask": make_key_mask("nothing", shape, generator_for(5))}
    masks["attn_mask"] = make_attn_mask("empty-rows", shape, generator_for(7))
    for mask in ({}, masks):
        check_attention(triton_attention, *tensors, **mask)
        launch, *others = found[-1]
        assert (launch.arguments["ROW_BLOCKS"], launch.arguments["num_splits"]) == (row_blocks, splits)
        assert len(others) == (splits > 1 or shape.heads > shape.kv_heads)


def test_few_queries_have_a_gradient_a_program():
    """Where it was measured to be faster: half types on a card with warp groups."""
    hopper, ampere = Card((9, 0), 132), Card((8, 0), 108)
    for card, dtype, sizes, expected in (
        (hopper, torch.bfloat16, (160, 77, 256, 32), SplitConfig),
        (hopper, torch.float16, (64, 77, 1024, 80), SplitConfig),
        (hopper, torch.bfloat16, (160, 77, 256, 64), SplitConfig),
        (hopper, torch.bfloat16, (160, 77, 256, 129), BackwardConfig),
        (hopper, torch.bfloat16, (160, 77, 257, 32), BackwardConfig),
        (hopper, torch.bfloat16, (160, 77, 128, 32), BackwardConfig),
        (hopper, torch.bfloat16, (64, 77, 4096, 20), BackwardConfig),
        (hopper, torch.bfloat16, (160, 81, 256, 32), BackwardConfig),
        (hopper, torch.float32, (160, 77, 256, 32), BackwardConfig),
        (ampere, torch.bfloat16, (160, 77, 256, 32), BackwardConfig),
    ):
        assert type(backward_config(card, dtype, *sizes)) is expected, (card, dtype, sizes)
