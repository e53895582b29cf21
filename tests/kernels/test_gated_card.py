"""The kernels of gated feed-forward blocks on a CUDA card, in every type, under the tolerance rule, and compiled."""

import pytest
import torch

from mmattn.nn import FeedForward
from mmattn.nn.gated_activation import GATES, gated
from mmattn.nn.names import DIFFUSERS_FEED_FORWARD
from mmattn.ops.triton_missing import triton_missing
from tests.gpu.card import DEVICE, DTYPES, HALF_TYPES, MARKS
from tests.kernels.gated_cases import check_gated, draw, product, with_gradient

pytest.importorskip("triton")
is_served = DEVICE == "cuda" and torch.cuda.is_available() and triton_missing(DEVICE) is None
pytestmark = [*MARKS, pytest.mark.skipif(not is_served, reason="the kernels cannot be used here")]
# Few widths: each is compiled for.
SIZES = [(2, 5, 2 * 256), (7, 2 * 37), (0, 2 * 256), (4, 1031, 2 * 1280), (65537, 2 * 37)]


def kernels_of(run):
    """The names of the kernels that a call launches."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    return [event.key for event in profile.key_averages()]


@pytest.mark.parametrize("name", GATES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes(dtype, name):
    for shape in SIZES:
        check_gated(gated, *draw(shape, dtype, DEVICE), name)


@pytest.mark.parametrize("name", GATES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_any_strides(dtype, name):
    joined, cotangent = draw((5, 67, 2 * 640), dtype, DEVICE)
    for skipped in (8, 3):
        wide = joined.new_zeros(5, 67, skipped + 2 * 640 + 8)
        check_gated(gated, wide[..., skipped:-8].copy_(joined), cotangent, name)
    check_gated(gated, joined.transpose(0, 1), cotangent.transpose(0, 1), name)
    check_gated(gated, joined, cotangent[:1, :1].expand_as(cotangent), name)


def test_it_is_these_kernels_that_run():
    joined, cotangent = draw((67, 2 * 640), torch.bfloat16, DEVICE)
    names = kernels_of(lambda: with_gradient(gated, joined, GATES["geglu"], cotangent))
    assert sum("gated_fwd" in name for name in names) == sum("gated_bwd" in name for name in names) == 1
    with torch.no_grad():
        names = kernels_of(lambda: gated(joined, GATES["geglu"]))
    assert sum("gated_fwd" in name for name in names) == 1


@pytest.mark.parametrize("dtype", HALF_TYPES, ids=str)
def test_the_same_bits_in_every_run_and_in_a_graph(dtype):
    joined, cotangent = draw((1031, 2 * 1280), dtype, DEVICE)
    first, again = (with_gradient(gated, joined, GATES["geglu"], cotangent) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        output = gated(joined, GATES["geglu"])
    output.zero_()
    graph.replay()
    assert torch.equal(output, first[0])


@pytest.mark.parametrize("name", GATES)
def test_compiled_in_one_piece(name):
    torch.compiler.reset()
    compiled = torch.compile(lambda x, gate: gated(x * 2, gate) + 1, fullgraph=True)
    for shape in ((3, 67, 2 * 640), (5, 67, 2 * 640)):
        joined, cotangent = draw(shape, torch.bfloat16, DEVICE)
        got = with_gradient(compiled, joined, GATES[name], cotangent)
        want = with_gradient(lambda x, gate: gated(x * 2, gate) + 1, joined, GATES[name], cotangent)
        for ours, theirs in zip(got, want, strict=True):
            torch.testing.assert_close(ours, theirs)
    names = kernels_of(lambda: with_gradient(compiled, joined, GATES[name], cotangent))
    assert sum("gated_bwd" in name for name in names) == 1
    torch.compiler.reset()


@pytest.mark.parametrize("activation", GATES)
def test_a_block_under_autocast(activation):
    """Beside the same block in float64, by torch's operations."""
    block = FeedForward(64, 256, activation=activation, names=DIFFUSERS_FEED_FORWARD).to(DEVICE)
    x = torch.randn(3, 67, 64, device=DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        block(x).square().mean().backward()
    found = [parameter.grad.double() for parameter in block.parameters()]
    exact = block.double()
    exact.zero_grad()
    exact(x.double()).square().mean().backward()
    for got, parameter in zip(found, exact.parameters(), strict=True):
        assert (got - parameter.grad).norm() <= 0.02 * parameter.grad.norm()


def test_second_derivatives_are_torchs():
    joined, cotangent = draw((7, 2 * 16), torch.float32, DEVICE)
    found = []
    for function in (gated, product):
        leaf = joined.clone().requires_grad_()
        output = function(leaf, GATES["geglu"])
        (gradient,) = torch.autograd.grad(output, leaf, cotangent, create_graph=True)
        found.append(torch.autograd.grad(gradient.square().sum(), leaf)[0])
    torch.testing.assert_close(*found)
