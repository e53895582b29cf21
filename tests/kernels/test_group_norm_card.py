"""GroupNorm in channels-last on a CUDA card, in every type: against float64 under the tolerance rule, compiled, in a
CUDA graph."""

import pytest
import torch

from tests.gpu.card import DEVICE, DTYPES, HALF_TYPES, MARKS, USABLE
from tests.kernels.norm_cases import check_norm, draw, inputs, laid_out, results

pytest.importorskip("triton")
# Where attention's kernels can be used, so can these.
pytestmark = [*MARKS, pytest.mark.skipif("triton" not in USABLE, reason="the kernels cannot be used here")]

CASES = [
    ((2, 320, 32, 32), 32, True, True),
    ((3, 640, 16, 17), 32, True, True),
    ((1, 1280, 64, 64), 32, False, False),
    ((2, 1280, 8, 8), 1, True, True),
    ((1, 64, 257, 129), 16, False, True),
    ((2, 60, 7, 11), 6, True, True),
    ((1, 37, 19, 23), 37, True, False),
    ((5, 96, 1, 1), 4, True, True),
    ((2, 1, 40, 40), 1, False, True),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_output_and_gradients(case, dtype):
    sizes, groups, has_shift, has_silu = case
    check_norm(*inputs(sizes, dtype, has_shift=has_shift, device=DEVICE), groups, has_silu)


def test_a_mean_a_thousand_times_the_deviation():
    (x, *others), grad = inputs((2, 320, 32, 32), torch.float32, has_shift=True, device=DEVICE)
    check_norm([(draw(*x.shape) + 1000).to(x), *others], grad, 32, True)


@pytest.mark.parametrize("dtype", HALF_TYPES, ids=str)
def test_parameters_in_float32_and_the_same_bits_in_every_run(dtype):
    """As under autocast; remembered launches included, and gradients that lie otherwise."""
    (x, weight, bias, shift), grad = inputs((7, 640, 16, 16), dtype, has_shift=True, device=DEVICE)
    tensors = [x, weight.float(), bias.float(), shift]
    found = check_norm(tensors, grad, 32, True)
    for each in (grad, grad.contiguous()):
        for one, other in zip(found, check_norm(tensors, each, 32, True), strict=True):
            assert torch.equal(one, other)


def test_compiled_whole():
    from mmattn.kernels.group_norm import group_norm

    def call(x, weight, bias, shift, *rest):
        return group_norm(x * 2, weight, bias, shift, *rest) + 1

    torch.compiler.reset()
    tensors, grad = inputs((2, 320, 16, 16), torch.bfloat16, has_shift=True, device=DEVICE)
    tensors[0] = laid_out(tensors[0])
    compiled = torch.compile(call, fullgraph=True)
    found, wanted = (results(run, tensors, grad, 32, True) for run in (compiled, call))
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want)
        assert got.stride() == want.stride()
    torch.compiler.reset()


def test_a_graph_takes_it_in():
    if DEVICE != "cuda":
        pytest.skip("there are no graphs")
    from mmattn.kernels.group_norm import group_norm

    tensors, grad = inputs((2, 320, 16, 16), torch.bfloat16, has_shift=True, device=DEVICE)
    tensors[0] = laid_out(tensors[0])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        expected = results(group_norm, tensors, grad, 32, True)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = results(group_norm, tensors, grad, 32, True)
    for each in found:
        each.zero_()
    graph.replay()
    for got, want in zip(found, expected, strict=True):
        assert torch.equal(got, want)
