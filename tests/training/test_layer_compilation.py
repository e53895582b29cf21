"""Compiled layers: the same losses to rounding, and nothing left of it outside training steps."""

from __future__ import annotations

import itertools
import traceback

import pytest
import torch
from torch import nn

import mmattn
from mmattn.errors import RunError, UsageError
from mmattn.ops.observe import observing
from mmattn.training import layer_compilation, train
from mmattn.training.layer_compilation import LayerCompilation
from tests.training.layered_toy import LayeredTask, ToyLayer
from tests.training.toy import ToyTask, toy_config


@pytest.fixture
def compiled(monkeypatch):
    """Compiles without a compiler; the graphs that were made."""
    graphs = []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph

    monkeypatch.setattr(layer_compilation, "BACKEND", backend)
    torch.compiler.reset()
    yield graphs
    torch.compiler.reset()


@pytest.mark.parametrize("activation_checkpointing", [False, True])
def test_the_same_losses_and_equal_layers_share_a_graph(tmp_path, compiled, activation_checkpointing):
    losses, counts = [], []
    for is_on in (False, True):
        task = LayeredTask(dtype=torch.float64, has_batch_norm=True)
        own = [vars(layer).get("forward") for layer in task.model.layers]
        options = {"activation_checkpointing": activation_checkpointing, "torch_compile": is_on}
        result = train(task, toy_config(tmp_path / str(is_on), max_steps=6, eval_every=3, **options))
        losses.append(result.losses)
        counts.append(len(compiled))
        assert [vars(layer).get("forward") for layer in task.model.layers] == own
    assert losses[1] == pytest.approx(losses[0], rel=1e-12)
    assert counts[0] == 0
    assert 1 <= counts[1] <= 2  # the second for batches of any size


def test_evaluations_run_the_layers_as_they_are(compiled):
    task = LayeredTask()
    compilation = LayerCompilation(task, task.model)
    ids, scale = torch.zeros(2, 3, dtype=torch.long), torch.ones(2)
    with torch.no_grad():
        task.model(ids, scale)
    assert not compiled
    task.model(ids, scale)
    assert len(compiled) == 1
    compilation.undo()
    assert all("forward" not in vars(layer) for layer in task.model.layers)


def test_a_run_has_the_backends_that_are_chosen_for_it(compiled):
    class Layer(nn.Module):
        def forward(self, x):
            return mmattn.attention(x, x, x) * 1.0

    x = torch.randn(1, 2, 3, 5, requires_grad=True)
    for name in ("sdpa", "eager", "sdpa"):
        task = LayeredTask()
        task.repeated_layers, task.model = (Layer,), nn.Sequential(Layer())
        LayerCompilation(task, task.model)
        with mmattn.use_backend(name):
            task.model(x)
    names = [[node.target.__name__ for node in graph.graph.nodes if callable(node.target)] for graph in compiled]
    assert len(compiled) == 3
    assert ["scaled_dot_product_attention" in each for each in names] == [True, False, True]


def test_who_looks_at_attention_sees_it(compiled):
    class Layer(nn.Module):
        def forward(self, x):
            return mmattn.attention(x, x, x)

    task = LayeredTask()
    task.repeated_layers, task.model = (Layer,), nn.Sequential(Layer())
    LayerCompilation(task, task.model)
    calls = []
    with observing(calls.append):
        task.model(torch.randn(1, 2, 3, 5, requires_grad=True))
    assert len(calls) == 1
    assert not compiled


def test_more_kinds_of_layers_than_torch_compiles_one_code_for(compiled):
    task = LayeredTask()
    task.repeated_layers = (nn.Linear,)
    widths = [5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43]
    task.model = nn.Sequential(*[nn.Linear(width, after) for width, after in itertools.pairwise(widths)])
    LayerCompilation(task, task.model)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        task.model(torch.ones(3, 5)).sum().backward()
    assert len(compiled) >= 1


def test_nothing_to_compile_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"training\.torch_compile works layer by layer, and ToyModel has no layers"):
        train(ToyTask(), toy_config(tmp_path / "run", torch_compile=True))


def test_a_compiler_that_fails_is_named_with_the_layer(tmp_path, monkeypatch):
    def backend(_graph, _inputs):
        raise OSError("no compiler here")

    monkeypatch.setattr(layer_compilation, "BACKEND", backend)
    torch.compiler.reset()
    with pytest.raises(
        RunError, match=r"training\.torch_compile: layer layers\.0 cannot be compiled: .*no compiler"
    ) as told:
        train(LayeredTask(), toy_config(tmp_path / "run", torch_compile=True))
    line = backend.__code__.co_firstlineno + 1
    assert f"(from tests/training/test_layer_compilation.py:{line}, " in str(told.value)
    assert "--debug shows the traceback" in str(told.value)
    assert f"line {line}, in backend" in "".join(traceback.format_exception(told.value))


def test_switching_it_on_when_a_run_is_continued_is_said(tmp_path, compiled, capsys):
    train(LayeredTask(), toy_config(tmp_path / "run", max_steps=2))
    train(LayeredTask(), toy_config(tmp_path / "run", max_steps=4, torch_compile=True), resume=True)
    assert "changed, so losses agree to rounding only: torch_compile: False -> True" in capsys.readouterr().err


@pytest.mark.slow
def test_inductor(tmp_path):
    losses = [
        train(
            LayeredTask(dtype=torch.float32), toy_config(tmp_path / str(is_on), max_steps=4, torch_compile=is_on)
        ).losses
        for is_on in (False, True)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert ToyLayer in LayeredTask.repeated_layers
