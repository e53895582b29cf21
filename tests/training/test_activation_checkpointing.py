"""Layers computed anew in the backward pass: the same losses bit for bit, less memory."""

from __future__ import annotations

from contextvars import ContextVar

import pytest
import torch
from torch import nn

from mmattn.errors import UsageError
from mmattn.training import train
from mmattn.training.activation_checkpointing import ActivationCheckpointing
from mmattn.training.memory import estimate_memory, estimate_run
from mmattn.training.repeated_layers import repeated_layers
from tests.training.layered_toy import LayeredTask, ToyLayer
from tests.training.toy import ToyTask, toy_config


def test_the_same_losses_bit_for_bit(tmp_path):
    options = {"dropout_p": 0.3, "has_batch_norm": True, "dtype": torch.float32}
    losses, counts = [], []
    for is_on in (False, True):
        task = LayeredTask(**options)
        own = [vars(layer).get("forward") for layer in task.model.layers]
        forwards = 0

        def count(*_):
            nonlocal forwards
            forwards += 1

        for layer in task.model.layers:
            layer.out_proj.register_forward_hook(count)
        config = toy_config(tmp_path / str(is_on), max_steps=6, eval_every=3, activation_checkpointing=is_on)
        losses.append(train(task, config).losses)
        counts.append(forwards)
        assert [vars(layer).get("forward") for layer in task.model.layers] == own
    assert losses[0] == losses[1]
    assert counts == [3 * (6 + 2), 3 * (2 * 6 + 2)]  # twice in a step, once in an evaluation


def test_what_was_in_force_is_in_force_again():
    chosen: ContextVar[float] = ContextVar("chosen", default=1.0)

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = nn.Linear(5, 5)

        def forward(self, x):
            return (self.proj(x) * chosen.get()).exp()

    task = LayeredTask()
    task.repeated_layers, task.model = (Layer,), nn.Sequential(nn.Linear(5, 5), Layer())
    gradients = []
    for is_on in (False, True):
        task.model.zero_grad()
        checkpointing = ActivationCheckpointing(task, task.model) if is_on else None
        token = chosen.set(2.0)
        out = task.model(torch.ones(3, 5))
        chosen.reset(token)
        out.sum().backward()
        gradients.append([parameter.grad.clone() for parameter in task.model.parameters()])
        if checkpointing is not None:
            checkpointing.undo()
    for ours, plain in zip(*gradients, strict=True):
        assert torch.equal(ours, plain)


def test_a_forward_of_its_own_is_given_back():
    task = LayeredTask()
    layer = task.model.layers[0]
    layer.forward = own = lambda hidden: hidden
    checkpointing = ActivationCheckpointing(task, task.model)
    assert layer.forward is not own
    checkpointing.undo()
    assert layer.forward is own


def test_layers_are_found_by_class_the_outermost_ones():
    class Nest(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.ModuleList([ToyLayer(0.0, torch.float32)])

    task = LayeredTask()
    task.model.nest = Nest()
    assert list(repeated_layers(task, task.model)) == ["layers.0", "layers.1", "layers.2", "nest.parts.0"]
    task.repeated_layers = (ToyLayer, Nest)
    assert list(repeated_layers(task, task.model)) == ["layers.0", "layers.1", "layers.2", "nest"]


def test_nothing_to_act_on_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"ToyModel has no layers of the classes in ToyTask\.repeated_layers \(none\)"):
        train(ToyTask(), toy_config(tmp_path / "run", activation_checkpointing=True))
    task = LayeredTask(has_batch_norm=True)
    task.repeated_layers = (nn.BatchNorm1d,)
    with pytest.raises(UsageError, match="batch_norm has a batch norm, which would count its batch twice"):
        train(task, toy_config(tmp_path / "run", activation_checkpointing=True))


def test_the_estimate_counts_inputs_and_the_largest_layer():
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(8, width), nn.Tanh(), nn.Linear(width, 8)) for width in (16, 32, 24)]
    model, x = nn.Sequential(*layers), torch.randn(3, 8)
    plain = estimate_memory(model, lambda: model(x).square().sum())
    frugal = estimate_memory(model, lambda: model(x).square().sum(), recomputed=layers)
    numbers = [8, 8, 8, 8]  # inputs of the layers, and the output for the square
    assert plain.activations == 4 * 3 * (sum(numbers) + 16 + 32 + 24)
    assert frugal.activations == 4 * 3 * (sum(numbers) + 32)
    assert estimate_memory(model, lambda: model(x).square().sum()) == plain  # the hooks are gone
    task, config = LayeredTask(), toy_config("x")
    on = toy_config("x", activation_checkpointing=True)
    assert estimate_run(task, on).activations < estimate_run(task, config).activations
