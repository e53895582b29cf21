"""The diffusion recipe's layers compiled, for captions of changing length."""

from __future__ import annotations

import pytest
import torch

from mmattn.config import load_config
from mmattn.inference.diffusion.task import DiffusionConfig, DiffusionTask
from mmattn.training import layer_compilation
from mmattn.training.layer_compilation import LayerCompilation

OVERRIDES = ["model.unet.block_out_channels=[16,32]", "model.unet.attention=[false,true]", "data.size=60"]


@pytest.fixture
def task(tmp_path):
    config = load_config(DiffusionConfig, "diffusion/debug", [*OVERRIDES, f"training.output_dir={tmp_path}"])
    return DiffusionTask(config)


@pytest.fixture
def batches(task):
    """Three, whose longest captions differ, and the first's length again."""
    by_length = {}
    for number in range(len(task)):
        by_length.setdefault(task.collate([(0, number)])["input_ids"].shape[1], []).append((0, number))
    pairs = [draws[:2] for _, draws in sorted(by_length.items()) if len(draws) > 1]
    assert len(pairs) >= 3, "captions of three lengths are wanted"
    return [task.collate(pairs[index]) for index in (2, 1, 0, 2)]


def outcome(task, batch):
    task.model.zero_grad()
    loss = task.loss(task.model, batch).total
    loss.backward()
    return loss.detach(), {name: weight.grad for name, weight in task.model.named_parameters()}


def check(task, batches, seen=lambda: 0, *, rtol=1e-4, atol=1e-6):
    """The outcomes with and without compilation; the number of graphs after every batch."""
    task.model.eval()  # without dropout; gradients are what makes it a training step
    expected = [outcome(task, batch) for batch in batches]
    compilation = LayerCompilation(task, task.model)
    numbers = []
    try:
        for batch, (loss, gradients) in zip(batches, expected, strict=True):
            found = outcome(task, batch)
            torch.testing.assert_close(found[0], loss, rtol=rtol, atol=atol)
            torch.testing.assert_close(found[1], gradients, rtol=rtol, atol=atol)
            numbers.append(seen())
    finally:
        compilation.undo()
    return numbers


def test_a_second_length_of_captions_is_compiled_for_any(task, batches, monkeypatch):
    graphs = []
    monkeypatch.setattr(layer_compilation, "BACKEND", lambda graph, _inputs: graphs.append(graph) or graph)
    torch.compiler.reset()
    first, second, *later = check(task, batches, lambda: len(graphs))
    torch.compiler.reset()
    # The text encoder's layers, and the U-Net's transformers, all of one width.
    assert first < second <= first + 2
    assert later == [second, second]


@pytest.mark.slow
def test_inductor(task, batches):
    torch.compiler.reset()
    check(task, batches, rtol=1e-3, atol=1e-5)
    torch.compiler.reset()
