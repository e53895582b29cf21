"""On a card under autocast the input of several products is cast once: played on a CPU."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from mmattn.nn import CrossAttention, FeedForward, SelfAttention
from mmattn.nn import shared_input as shared_inputs
from mmattn.nn.shared_input import shared_input
from mmattn.ops.segments import Segments

WIDTH, ROWS = 32, 12
PACKED = Segments.of([5, 7])


class Adapted(nn.Linear):
    """A Linear with something to it."""


def run(kind: str, module: nn.Module, x: Tensor, context: Tensor) -> Tensor:
    if kind == "self":
        return module(x[None])[0]
    if kind == "self packed":
        return module(x, segments=PACKED)
    if kind == "cross":
        return module(x[None], context[None])[0]
    if kind == "cross packed":
        return module(x, context, segments=PACKED, context_segments=PACKED)
    return module(x)


KINDS = {
    "self": lambda: SelfAttention(WIDTH, 4),
    "self packed": lambda: SelfAttention(WIDTH, 4),
    "cross": lambda: CrossAttention(WIDTH, 4),
    "cross packed": lambda: CrossAttention(WIDTH, 4),
    "gated": lambda: FeedForward(WIDTH, 48, activation="swiglu"),
}


def results(kind: str, module: nn.Module) -> tuple[Tensor, dict[str, Tensor], int]:
    """The output, the gradients, and how often something of the size of the inputs was cast."""
    module = copy.deepcopy(module)
    torch.manual_seed(4)
    x, context = (torch.randn(ROWS, WIDTH, requires_grad=True) for _ in range(2))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        with torch.autocast("cpu", torch.bfloat16):
            output = run(kind, module, 1 * x, 1 * context)  # of leaves, which are cast once anyway, to ordinary tensors
        output.float().square().sum().backward()
    casts = [event for event in profile.events() if event.name == "aten::_to_copy"]
    sized = [event for event in casts if event.input_shapes[0][-2:] == [ROWS, WIDTH]]
    inputs = {name: tensor.grad for name, tensor in (("x", x), ("context", context)) if tensor.grad is not None}
    weights = {name: weight.grad for name, weight in module.named_parameters() if weight.grad is not None}
    return output, inputs | weights, len(sized)


@pytest.mark.parametrize("kind", KINDS)
def test_cast_once_outputs_are_the_same_bits_and_gradients_the_same_but_for_rounding(kind, monkeypatch):
    torch.manual_seed(3)
    module = KINDS[kind]()
    expected, expected_grads, many = results(kind, module)
    monkeypatch.setattr(shared_inputs, "_CASTS_ONCE", ("cpu",))
    output, grads, few = results(kind, module)
    assert torch.equal(output, expected)
    assert grads.keys() == expected_grads.keys()
    for name, grad in grads.items():
        error = (grad - expected_grads[name]).abs().max() / expected_grads[name].abs().max()
        assert error < 2**-6, name
        assert grad.dtype is torch.float32
    assert few < many


def test_a_cpu_and_what_is_no_plain_linear_keep_their_input(monkeypatch):
    x, linear = torch.randn(2, 4), nn.Linear(4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert shared_input(x, linear) is x
        monkeypatch.setattr(shared_inputs, "_CASTS_ONCE", ("cpu",))
        assert shared_input(x, linear).dtype is torch.bfloat16
        assert shared_input(x, linear, Adapted(4, 4)) is x
        hooked = nn.Linear(4, 4)
        for register in (hooked.register_forward_hook, hooked.register_forward_pre_hook):
            hook = register(print)
            assert shared_input(x, linear, hooked) is x
            hook.remove()
        assert shared_input(x, linear, hooked).dtype is torch.bfloat16
        assert shared_input(x.double(), linear).dtype is torch.float64
    assert shared_input(x, linear) is x
