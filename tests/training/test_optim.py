from __future__ import annotations

import pytest
import torch
from torch import nn

from mmattn.errors import UsageError
from mmattn.training.ema import ParameterAverage, replaced
from mmattn.training.optim import (
    learning_rate,
    load_optimizer_tensors,
    make_optimizer,
    optimizer_tensors,
    trainable_parameters,
    undecayed_names,
)
from tests.training.toy import toy_config


class Parts(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(5, 3)
        self.position_table = nn.Parameter(torch.zeros(7, 3))
        self.attn_gate = nn.Parameter(torch.zeros(()))
        self.norm = nn.LayerNorm((2, 3))
        self.proj = nn.Linear(3, 2)
        self.frozen = nn.Linear(3, 2).requires_grad_(False)


def test_decay_is_on_matrices_only():
    model = Parts()
    assert set(trainable_parameters(model)) - undecayed_names(model) == {"proj.weight"}
    optimizer = make_optimizer(model, toy_config("x", weight_decay=0.1), torch.device("cpu"))
    assert [(group["weight_decay"], len(group["params"])) for group in optimizer.param_groups] == [(0.1, 1), (0.0, 6)]


def test_a_tied_embedding_is_not_decayed():
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5, bias=False))
    model[1].weight = model[0].weight
    assert undecayed_names(model) == {"0.weight"}


def test_nothing_to_train_is_said():
    with pytest.raises(UsageError, match="nothing to train: no parameter of Linear has requires_grad"):
        trainable_parameters(nn.Linear(2, 3).requires_grad_(False))


def test_schedule_values():
    cosine = toy_config("x", learning_rate=2.0, warmup_steps=4, max_steps=14, min_learning_rate_ratio=0.1)
    rates = [learning_rate(cosine, step) for step in range(15)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert rates[4] == 2.0
    assert rates[9] == pytest.approx(1.1)  # half way between 2.0 and its tenth
    assert rates[14] == pytest.approx(0.2)
    assert rates[4:] == sorted(rates[4:], reverse=True)
    constant = toy_config("x", learning_rate=2.0, warmup_steps=2, schedule="constant")
    assert [learning_rate(constant, step) for step in (0, 1, 2, 1000)] == [1.0, 2.0, 2.0, 2.0]
    assert learning_rate(toy_config("x", learning_rate=2.0, warmup_steps=0), 0) == 2.0


def test_optimizer_state_continues_bit_for_bit():
    def make():
        torch.manual_seed(1)
        model = Parts()
        return model, make_optimizer(model, toy_config("x"), torch.device("cpu"))

    def step(model, optimizer, seed):
        generator = torch.Generator().manual_seed(seed)
        for parameter in trainable_parameters(model).values():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()

    straight, optimizer = make()
    for seed in range(4):
        step(straight, optimizer, seed)
    first, first_optimizer = make()
    for seed in range(2):
        step(first, first_optimizer, seed)
    second, second_optimizer = make()
    second.load_state_dict(first.state_dict())
    tensors = optimizer_tensors(first_optimizer, trainable_parameters(first))
    load_optimizer_tensors(second_optimizer, trainable_parameters(second), tensors)
    for seed in range(2, 4):
        step(second, second_optimizer, seed)
    assert all(
        torch.equal(ours, theirs) for ours, theirs in zip(second.parameters(), straight.parameters(), strict=True)
    )


def test_average_values():
    value = nn.Parameter(torch.tensor([1.0, 3.0], dtype=torch.bfloat16))
    count = torch.tensor(7)
    average = ParameterAverage({"value": value, "count": count}, decay=0.5)
    assert set(average.averages) == {"value"}
    assert average.averages["value"].dtype == torch.float32
    expected = value.detach().float()
    for update in range(20):
        with torch.no_grad():
            value += 1
        average.update()
        decay = min(0.5, (1 + update) / (10 + update))
        expected = decay * expected + (1 - decay) * value.detach().float()
        torch.testing.assert_close(average.averages["value"], expected)
    own = value.detach().clone()
    with replaced(average.tensors, average.averages):
        assert torch.equal(value, average.averages["value"].to(torch.bfloat16))
    assert torch.equal(value, own)
