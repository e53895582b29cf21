"""The kernels of gated feed-forward blocks on Triton's interpreter, against float64 under the tolerance rule."""

from unittest import mock

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mmattn.nn import gated_activation
from mmattn.nn.gated_activation import GATES, gated
from tests.kernels.gated_cases import SHAPES, check_gated, draw, product, with_gradient

pytest.importorskip("triton")
pytestmark = pytest.mark.interpreter

# Imported here, after the check: they need triton.
from mmattn.kernels import gated as kernels  # noqa: E402

ROADS = ("_forward", "_backward_of")


@pytest.fixture
def on_cpu(monkeypatch):
    """Blocks take the kernels on the interpreter too; gives how often each ran."""
    monkeypatch.setattr(gated_activation, "_KERNEL_DEVICES", ("cpu",))
    spies = [mock.Mock(side_effect=getattr(kernels, name)) for name in ROADS]
    for name, spy in zip(ROADS, spies, strict=True):
        monkeypatch.setattr(kernels, name, spy)
    return lambda: tuple(spy.call_count for spy in spies)


@pytest.mark.parametrize("name", GATES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_sizes(name, dtype, on_cpu):
    for shape in SHAPES:
        check_gated(gated, *draw(shape, dtype), name)
    assert on_cpu() == (len(SHAPES), len(SHAPES))


@pytest.mark.parametrize("name", GATES)
def test_rows_of_any_strides(name, on_cpu):
    """Parts of wider rows, of 16 bytes and not; columns that are not contiguous; a gradient that is one number."""
    joined, cotangent = draw((5, 3, 2 * 24), torch.float16)
    for skipped in (8, 3):
        wide = torch.zeros(5, 3, skipped + 2 * 24 + 8, dtype=torch.float16)
        part = wide[..., skipped:-8].copy_(joined)
        check_gated(gated, part, cotangent, name)
    check_gated(gated, joined.permute(2, 1, 0).contiguous().permute(2, 1, 0), cotangent, name)
    check_gated(gated, joined.transpose(0, 1), cotangent.transpose(0, 1), name)
    check_gated(gated, joined, torch.ones(1, dtype=torch.float16).expand_as(cotangent), name)
    check_gated(gated, joined, cotangent[:1, :1].expand_as(cotangent), name)
    assert on_cpu() == (6, 6)


@pytest.mark.parametrize("ends", [(-14, -2), (-2, 2), (2, 8)], ids=str)
@pytest.mark.parametrize("name", GATES)
def test_float32_where_results_are_small_and_where_they_are_not(name, ends, on_cpu):
    gates = torch.linspace(*ends, 2048)
    joined = torch.stack([torch.ones_like(gates), gates], dim=-1)
    check_gated(gated, joined, torch.ones(2048, 1), name)
    assert on_cpu() == (1, 1)


def test_the_normal_distribution_is_as_exact_as_float32(on_cpu):
    gates = torch.linspace(-14, 14, 2**13)
    output = gated(torch.stack([torch.ones_like(gates), gates], dim=-1), GATES["geglu"])[:, 0]
    share = torch.special.ndtr(gates.double())
    error = (output / gates.double() - share).abs()
    eps = torch.finfo(torch.float32).eps
    assert error.max() <= 1.5 * eps
    assert (error / share)[gates > -5].max() <= 16 * eps  # 1 + erf is wrong by a third there
    assert on_cpu() == (1, 0)


def test_what_is_not_finite_stays_where_it_is(on_cpu):
    joined, cotangent = draw((3, 2 * 16), torch.float32)
    clean = with_gradient(gated, joined, GATES["geglu"], cotangent)
    joined[1, 3] = float("nan")
    joined[1, 16 + 5] = float("inf")
    output, gradient = with_gradient(gated, joined, GATES["geglu"], cotangent)
    assert (~output.isfinite()).nonzero().tolist() == [[1, 3], [1, 5]]
    assert {tuple(place) for place in (~gradient.isfinite()).nonzero().tolist()} <= {(1, 5), (1, 16 + 3), (1, 16 + 5)}
    assert torch.equal(output[[0, 2]], clean[0][[0, 2]])
    assert on_cpu() == (2, 2)


def test_opcheck():
    joined, cotangent = draw((2, 3, 2 * 8), torch.float32)
    torch.library.opcheck(kernels.gated, (joined.requires_grad_(), "gelu"))
    torch.library.opcheck(kernels.gated, (joined.detach().transpose(0, 1), "silu"))
    torch.library.opcheck(kernels.gated_backward, (cotangent, joined.detach(), "silu"))


@pytest.mark.parametrize("name", GATES)
def test_derivatives_that_kernels_have_not(name, on_cpu):
    """Of gradients, in torch.func and forwards: by torch's operations, as ever."""
    joined, cotangent = draw((2, 2 * 3), torch.float32)
    found, wanted = [], []
    for function, results in ((gated, found), (product, wanted)):
        leaf = joined.clone().requires_grad_()

        def call(x, function=function):
            return function(x, GATES[name])

        (gradient,) = torch.autograd.grad(call(leaf), leaf, cotangent, create_graph=True)
        results += [gradient.detach(), torch.autograd.grad(gradient.square().sum(), leaf)[0]]
        results.append(torch.func.vmap(torch.func.grad(lambda x, call=call: call(x).sum()))(joined))
        results.append(torch.func.jvp(call, (joined,), (joined,))[1])
        several = torch.stack([cotangent, 2 * cotangent])
        results.append(torch.autograd.grad(call(leaf), leaf, several, is_grads_batched=True)[0])
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want)
    assert on_cpu()[1] == 0


def test_within_a_dispatch_mode(on_cpu):
    """Through the dispatcher, the same bits; and what is kept is the input alone."""
    joined, cotangent = draw((3, 2 * 8), torch.float32)
    plain = with_gradient(gated, joined, GATES["swiglu"], cotangent)
    with FlopCounterMode(display=False):
        seen = with_gradient(gated, joined, GATES["swiglu"], cotangent)
    assert all(torch.equal(*pair) for pair in zip(plain, seen, strict=True))
    kept = []
    leaf = joined.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda each: kept.append(each.data_ptr()) or each, lambda each: each):
        gated(leaf, GATES["swiglu"])
    assert kept == [leaf.data_ptr()]
    assert on_cpu() == (3, 2)


@pytest.mark.parametrize("name", GATES)
def test_compiled_in_one_piece(name, on_cpu):
    graphs = []

    def backend(graph, _inputs):
        graphs.append([node.target for node in graph.graph.nodes])
        return graph

    torch.compiler.reset()
    call = torch.compile(lambda x: gated(x * 2, GATES[name]) + 1, fullgraph=True, backend=backend, dynamic=True)
    for rows in (3, 5):
        joined, cotangent = draw((rows, 2 * 8), torch.float32)
        leaf = joined.requires_grad_()
        (got,) = torch.autograd.grad(call(leaf), leaf, cotangent)
        (want,) = torch.autograd.grad(product(leaf * 2, GATES[name]), leaf, cotangent)
        torch.testing.assert_close(got, want)
    assert sum("mmattn.gated" in str(target) for target in graphs[0]) == 1
    torch.compiler.reset()


def test_compiled_transforms(on_cpu):
    def loss(x):
        return gated(x, GATES["geglu"]).square().sum()

    joined, _ = draw((3, 2 * 4), torch.float32)
    torch.compiler.reset()
    transforms = [torch.func.grad(loss), torch.func.vmap(torch.func.grad(loss))]
    transforms.append(lambda x: torch.func.jvp(loss, (x,), (x,))[1])
    for transform in transforms:
        got = torch.compile(transform, fullgraph=True, backend="aot_eager")(joined)
        torch.testing.assert_close(got, transform(joined))
    torch.compiler.reset()


@pytest.mark.parametrize(("dtype", "width"), [(torch.float64, 8), (torch.bfloat16, 8), (torch.float32, 8)])
def test_a_cpu_takes_torchs_operations(dtype, width):
    """As long as nobody says otherwise: not one bit of a CPU's results changes."""
    joined, cotangent = draw((3, 2 * width), dtype)
    with mock.patch.object(kernels, "_forward", side_effect=AssertionError):
        output, gradient = with_gradient(gated, joined, GATES["geglu"], cotangent)
    wanted = with_gradient(product, joined, GATES["geglu"], cotangent)
    assert torch.equal(output, wanted[0])
    assert torch.equal(gradient, wanted[1])
