"""GroupNorm in channels-last, on Triton's interpreter: against float64 under the tolerance rule."""

import pytest
import torch
from torch.nn.functional import group_norm as torch_group_norm
from torch.nn.functional import silu

from mmattn.errors import UsageError
from tests.kernels.norm_cases import check_norm, draw, inputs, results

pytest.importorskip("triton")
pytestmark = pytest.mark.interpreter

# Imported here, after the check: they need triton.
from mmattn.kernels import group_norm as operation  # noqa: E402
from mmattn.kernels import group_norm_launches  # noqa: E402
from mmattn.kernels.group_norm import (  # noqa: E402
    group_norm,
    group_norm_backward_operation,
    group_norm_operation,
)
from mmattn.kernels.group_norm_launches import CONFIGS, Config, Cut  # noqa: E402

BLOCKS = Config(16, 32, 4)
LAYOUT = torch.channels_last


@pytest.fixture
def small_blocks(monkeypatch):
    """So that few pixels are many blocks."""
    monkeypatch.setattr(operation, "norm_config", lambda: BLOCKS)


def through(*inputs):
    """By the dispatcher."""
    return group_norm_operation(*inputs)[0]


CASES = [
    ((2, 60, 7, 11), 6, True, True),  # blocks of 32 channels cut groups of 10
    ((1, 32, 1, 5), 32, False, True),
    ((3, 66, 13, 3), 1, True, False),
    ((1, 37, 19, 23), 37, False, False),
    ((2, 24, 1, 1), 2, True, True),  # nothing to tell layouts by
    ((2, 1, 9, 4), 1, False, True),
    ((1, 48, 16, 9), 3, False, True),  # whole blocks alone
]


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_output_and_gradients(case, dtype):
    sizes, groups, has_shift, has_silu = case
    check_norm(*inputs(sizes, dtype, has_shift=has_shift), groups, has_silu)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_configuration(monkeypatch, config):
    monkeypatch.setattr(operation, "norm_config", lambda: config)
    check_norm(*inputs((1, 80, 17, 9), torch.float16, has_shift=True), 8, True)


@pytest.mark.usefixtures("small_blocks")
def test_a_mean_a_thousand_times_the_deviation():
    """In float32, which still has a difference: in squares it would be lost."""
    (x, weight, bias, shift), grad = inputs((2, 32, 13, 11), torch.float32, has_shift=True)
    x = draw(*x.shape) + 1000
    check_norm([x, weight, bias, shift], grad, 4, True)


@pytest.mark.usefixtures("small_blocks")
def test_a_first_block_unlike_the_others():
    """What distances are taken from is far from the mean."""
    (x, weight, bias, shift), grad = inputs((1, 32, 16, 16), torch.float32, has_shift=False)
    x[:, :, 0] = 300
    check_norm([x, weight, bias, shift], grad, 4, False)


@pytest.mark.usefixtures("small_blocks")
def test_groups_of_many_channels_and_shares(monkeypatch):
    """More than a program holds at once."""
    monkeypatch.setattr(group_norm_launches, "_NUMBERS_A_WARP", 32)
    tensors, grad = inputs((1, 96, 16, 21), torch.float16, has_shift=True)
    assert Cut.of(tensors[0], 2, BLOCKS).num_shares == 11
    check_norm(tensors, grad, 2, True)


@pytest.mark.usefixtures("small_blocks")
def test_many_pictures_add_up_to_gradients_of_parameters():
    check_norm(*inputs((70, 16, 2, 3), torch.float32, has_shift=False), 4, True)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("kind", ["strides", "layout", "expanded"])
def test_gradients_that_lie_otherwise(kind):
    tensors, grad = inputs((2, 32, 7, 5), torch.float16, has_shift=True)
    if kind == "strides":
        grad = torch.cat([grad, grad], 1).to(memory_format=LAYOUT)[:, 16:48]
    elif kind == "layout":
        grad = grad.contiguous()
    else:
        grad = grad[:1, :, :1, :1].expand(2, 32, 7, 5)
    check_norm(tensors, grad, 4, True)


@pytest.mark.usefixtures("small_blocks")
def test_parameters_in_float32_beside_half_pictures():
    """As under autocast."""
    (x, weight, bias, shift), grad = inputs((2, 32, 7, 5), torch.float16, has_shift=True)
    check_norm([x, weight.float(), bias.float(), shift], grad, 4, True)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_parameters_of_any_type(dtype):
    """What they say is computed with in float32, and their gradients are rounded once (the interpreter cuts bfloat16
    off)."""
    tensors, grad = inputs((2, 32, 7, 5), torch.float32, has_shift=True)
    others = [tensors[0], *[tensor.bfloat16().to(dtype) for tensor in tensors[1:]]]
    found = results(group_norm, others, grad, 4, True)
    wanted = results(group_norm, [tensor.float() for tensor in others], grad, 4, True)
    for got, want, leaf in zip(found, wanted, [others[0], *others], strict=True):
        torch.testing.assert_close(got, want.to(leaf.dtype), rtol=torch.finfo(leaf.dtype).eps, atol=0)


@pytest.mark.parametrize("sizes", [(0, 8, 3, 5), (2, 8, 0, 5)], ids=str)
def test_nothing(sizes):
    tensors, grad = inputs(sizes, torch.float32, has_shift=True)
    output, *grads = results(group_norm, tensors, grad, 2, True)
    assert output.shape == sizes
    for each, leaf in zip(grads, tensors, strict=True):
        assert each.shape == leaf.shape
        assert not each.any()


@pytest.mark.usefixtures("small_blocks")
def test_both_roads_give_the_same_bits_in_every_run():
    tensors, grad = inputs((2, 32, 9, 5), torch.float16, has_shift=True)
    first, again, other = (results(run, tensors, grad, 4, True) for run in (group_norm, group_norm, through))
    for got in zip(first, again, other, strict=True):
        assert torch.equal(got[0], got[1])
        assert torch.equal(got[0], got[2])
        assert got[0].stride() == got[2].stride()


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("run", [group_norm, through], ids=["round", "op"])
def test_only_gradients_that_are_wanted(run):
    tensors, grad = inputs((2, 32, 9, 5), torch.float32, has_shift=True)
    everything = results(run, tensors, grad, 4, True)[1:]
    for wanted in ((True, False, False, False), (False, True, False, False), (False, False, True, True)):
        leaves = [tensor.detach().requires_grad_(flag) for tensor, flag in zip(tensors, wanted, strict=True)]
        run(*leaves, 4, 1e-5, True).backward(grad)
        for leaf, flag, want in zip(leaves, wanted, everything, strict=True):
            assert (leaf.grad is not None) == flag
            assert not flag or torch.equal(leaf.grad, want)
    with torch.no_grad():
        assert not run(*leaves, 4, 1e-5, True).requires_grad


@pytest.mark.parametrize("run", [group_norm, through], ids=["round", "op"])
def test_gradients_of_gradients_are_refused(run):
    tensors, _ = inputs((1, 8, 3, 3), torch.float32, has_shift=False)
    leaves = [tensor.requires_grad_() for tensor in tensors[:3]]
    output = run(*leaves, None, 2, 1e-5, True)
    (grad,) = torch.autograd.grad(output.square().sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        torch.autograd.grad(grad.sum(), leaves[1])


@pytest.mark.parametrize("sizes", [(2, 8, 3, 5), (2, 8, 1, 1), (2, 1, 3, 5), (0, 8, 3, 5)], ids=str)
def test_opcheck(sizes):
    tensors, grad = inputs(sizes, torch.float32, has_shift=True)
    groups = min(2, sizes[1])
    leaves = [tensor.requires_grad_() for tensor in tensors]
    torch.library.opcheck(group_norm_operation, (*leaves, groups, 1e-5, True))
    x, weight, bias, shift = [tensor.detach() for tensor in tensors]
    torch.library.opcheck(group_norm_operation, (x, weight, bias, None, groups, 1e-5, False))
    _, norms = group_norm_operation(x, weight, bias, shift, groups, 1e-5, True)
    for rest in ((torch.float16, True, True), (None, False, True), (None, True, False)):
        torch.library.opcheck(group_norm_backward_operation, (grad, x, weight, bias, norms, groups, True, *rest))


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("has_shift", [False, True])
def test_compiled_whole(has_shift):
    """One graph, forward and backward, that keeps the operation; with a frozen weight too."""
    tensors, grad = inputs((2, 16, 5, 3), torch.float32, has_shift=has_shift)
    compiled = torch.compile(group_norm, fullgraph=True, backend="aot_eager")
    leaves = [None if tensor is None else tensor.requires_grad_() for tensor in tensors]
    for is_frozen in (False, True):
        leaves[1].requires_grad_(not is_frozen)
        wanted = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
        outputs = [run(*leaves, 4, 1e-5, True) for run in (compiled, group_norm)]
        assert torch.equal(*outputs)
        assert outputs[0].stride() == outputs[1].stride()
        for got, want in zip(*(torch.autograd.grad(output, wanted, grad) for output in outputs), strict=True):
            assert torch.equal(got, want)


def test_pictures_are_shared_out_and_a_last_share_is_shorter():
    cut = Cut.of(torch.empty(1, 32, 5, 23), 4, BLOCKS)
    assert (cut.num_shares, cut.per_share) == (8, 16)
    cut = Cut.of(torch.empty(16, 32, 5, 23), 4, BLOCKS)
    assert (cut.num_shares, cut.per_share) == (2, 64)


def test_what_does_not_fit_is_refused():
    x, weight = torch.zeros(2, 8, 3, 5), torch.ones(8)

    def call(x, weight=weight, shift=None, groups=2):
        return group_norm(x, weight, weight, shift, groups, 1e-5, True)

    with pytest.raises(UsageError, match="in channels-last"):
        call(x)
    x = x.contiguous(memory_format=LAYOUT)
    with pytest.raises(UsageError, match=r"float64: give pictures"):
        call(x.double())
    with pytest.raises(UsageError, match="8 channels, 3 groups"):
        call(x, groups=3)
    with pytest.raises(UsageError, match=r"shift \[2, 4\]: give \[2, 8\]"):
        call(x, shift=torch.zeros(2, 4))
    with pytest.raises(UsageError, match=r"weight is torch.float32 on meta: give .* on cpu"):
        call(x, weight.to("meta"))


def test_as_torch_has_it():
    tensors, _ = inputs((2, 32, 9, 5), torch.float32, has_shift=False)
    found = group_norm(*tensors, 4, 1e-5, True)
    torch.testing.assert_close(found, silu(torch_group_norm(tensors[0], 4, *tensors[1:3], 1e-5)))
