"""Eager calls go round torch's dispatcher, others through it: the same bits, and nobody is passed by."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from tests.kernels.cases import FEW_KEYS, MANY_KEYS, triton_attention
from tests.ops.cases import generator_for, make_inputs, make_key_mask

pytest.importorskip("triton")
pytestmark = pytest.mark.interpreter

from mmattn.kernels import short_keys  # noqa: E402
from mmattn.kernels.plain import is_plain_call  # noqa: E402
from mmattn.kernels.short_keys import attend, short_key_attention  # noqa: E402

SMALL = FEW_KEYS


class Seen(TorchDispatchMode):
    """Operations that come to the dispatcher."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def draw(shape=SMALL, has_grad=False, dtype=torch.float32):
    tensors = make_inputs(shape, dtype, generator_for(3))
    return [tensor.requires_grad_(has_grad) for tensor in tensors]


def masks_of(shape):
    key_mask = make_key_mask("gaps", shape, generator_for(5))
    attn_mask = torch.rand(1, shape.heads, shape.queries, shape.keys, generator=generator_for(7)) < 0.7
    return key_mask.unsqueeze(1), attn_mask


@pytest.fixture
def operation_runs(monkeypatch):
    """How often the operation's own function is called, whatever road leads to the launches."""
    runs = []
    apply = short_keys._apply
    monkeypatch.setattr(short_keys, "_apply", lambda *arguments: (runs.append("round"), apply(*arguments))[1])
    operation = short_keys.short_key_attention
    monkeypatch.setattr(
        short_keys, "short_key_attention", lambda *arguments: (runs.append("through"), operation(*arguments))[1]
    )
    return runs


@pytest.mark.parametrize("shape", [FEW_KEYS, MANY_KEYS], ids=str)
@pytest.mark.parametrize("has_grad", [False, True])
def test_both_roads_give_the_same_bits(operation_runs, shape, has_grad):
    tensors = draw(shape, has_grad, torch.float16)
    key_mask, attn_mask = masks_of(shape)
    results = []
    for road in (attend, lambda *arguments: short_key_attention(*arguments)[0]):
        output = road(*tensors, key_mask, attn_mask, 0.3)
        assert output.requires_grad == has_grad
        results.append([output, *(torch.autograd.grad(output.square().sum(), tensors) if has_grad else ())])
    assert operation_runs == (["round"] if has_grad else [])
    for round_it, through in zip(*results, strict=True):
        assert torch.equal(round_it, through)
        assert round_it.stride() == through.stride()


def test_only_gradients_that_are_wanted():
    for wanted in ((True, False, False), (False, True, False), (False, False, True)):
        tensors = [tensor.requires_grad_(flag) for tensor, flag in zip(draw(), wanted, strict=True)]
        attend(*tensors, None, None, 0.3).sum().backward()
        assert [tensor.grad is not None for tensor in tensors] == list(wanted)
    with torch.no_grad():
        assert not attend(*draw(has_grad=True), None, None, 0.3).requires_grad
    with torch.inference_mode():
        assert attend(*draw(), None, None, 0.3).is_inference()


def test_what_is_plain():
    query, key, value = draw()
    assert is_plain_call(query, key, value)
    assert is_plain_call(torch.nn.Parameter(query), key.transpose(1, 2), value.detach())
    assert not is_plain_call(query, TwoTensor(key, key), value)
    assert not is_plain_call(query, key, torch._neg_view(value))
    with Seen():
        assert not is_plain_call(query, key, value)
    with FakeTensorMode():
        assert not is_plain_call(query, key, value)
    with forward_ad.dual_level():
        assert not is_plain_call(query, key, value)
    found = []
    torch.func.vmap(lambda tensor: (found.append(is_plain_call(tensor)), tensor)[1])(query)
    torch.func.grad(lambda tensor: (found.append(is_plain_call(tensor)), tensor.sum())[1])(query)
    torch.jit.trace(lambda tensor: (found.append(is_plain_call(tensor)), tensor + 1)[1], query, check_trace=False)
    assert found == [False] * 3


def test_a_dispatch_mode_sees_the_operation():
    with Seen() as seen:
        attend(*draw(), None, None, 0.3)
    assert "mmattn.short_key_attention.default" in seen.names
    output = attend(*(tensors := draw(has_grad=True)), None, None, 0.3)
    with Seen() as seen:
        torch.autograd.grad(output.sum(), tensors)
    assert "mmattn.short_key_attention_backward.default" in seen.names


def test_traced_whole():
    tensors = draw()
    traced = make_fx(lambda *inputs: attend(*inputs, None, None, 0.3))(*tensors)
    targets = [node.target for node in traced.graph.nodes]
    assert torch.ops.mmattn.short_key_attention.default in targets
    assert torch.equal(traced(*tensors), attend(*tensors, None, None, 0.3))


def test_fake_tensors():
    query, key, value = draw()
    with FakeTensorMode() as mode:
        fake = attend(*(mode.from_tensor(tensor) for tensor in (query, key, value)), None, None, 0.3)
    expected = attend(query, key, value, None, None, 0.3)
    assert (fake.shape, fake.dtype, fake.stride()) == (expected.shape, expected.dtype, expected.stride())


def test_views_that_the_dispatcher_resolves():
    query, key, value = draw()
    negative = torch._neg_view(key)
    assert negative.is_neg()
    assert torch.equal(attend(query, negative, value, None, None, 0.3), attend(query, -key, value, None, None, 0.3))


def test_vmap_takes_the_operation():
    """Which has no rule for batches: torch calls it for each item."""
    tensors = [torch.stack([tensor, 2 * tensor]) for tensor in draw()]
    output = torch.func.vmap(lambda *inputs: triton_attention(*inputs))(*tensors)
    for place in range(2):
        assert torch.equal(output[place], triton_attention(*(tensor[place] for tensor in tensors)))


@pytest.mark.parametrize("road", [attend, lambda *arguments: short_key_attention(*arguments)[0]], ids=["round", "op"])
def test_gradients_of_gradients_are_refused(road):
    tensors = draw(has_grad=True)
    output = road(*tensors, None, None, 0.3)
    (grad,) = torch.autograd.grad(output.square().sum(), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        torch.autograd.grad(grad.sum(), tensors[1])


def test_checkpoints_and_saved_tensor_hooks():
    tensors = draw(has_grad=True)
    wanted = torch.autograd.grad(attend(*tensors, None, None, 0.3).square().sum(), tensors)
    again = checkpoint(attend, *tensors, None, None, 0.3, use_reentrant=False).square().sum()
    with torch.autograd.graph.save_on_cpu():
        hooked = attend(*tensors, None, None, 0.3).square().sum()
    for result in (again, hooked):
        for got, expected in zip(torch.autograd.grad(result, tensors), wanted, strict=True):
            assert torch.equal(got, expected)
