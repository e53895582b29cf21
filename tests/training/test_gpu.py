"""What differs on a GPU: precision, loss scaling, pinned batches."""

from __future__ import annotations

import json

import pytest
import torch

from mmattn.training import ahead, read_metrics, train
from mmattn.training.devices import resolve_precision
from tests.training.toy import ToyTask, toy_config

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_precision_is_never_bf16_by_itself_on_a_cpu():
    assert resolve_precision("auto", torch.device("cpu")) == "no"
    assert resolve_precision("bf16", torch.device("cpu")) == "bf16"


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("precision", ["auto", "no", "bf16", "fp16"])
def test_it_learns_and_resumes(tmp_path, precision):
    options = {"device": "auto", "mixed_precision": precision, "eval_every": 5, "ema_decay": 0.9, "num_workers": 2}
    whole = train(ToyTask(), toy_config(tmp_path / "whole", **options))
    train(ToyTask(), toy_config(tmp_path / "pieces", **{**options, "max_steps": 10}, schedule="constant"))
    pieces = train(ToyTask(), toy_config(tmp_path / "pieces", **options, schedule="constant"), resume=True)
    assert whole.losses[-1] < 0.8 * whole.losses[0]
    assert (pieces.step, len(pieces.losses)) == (20, 10)
    line = read_metrics(tmp_path / "whole/metrics.jsonl", kind="train")[0]
    assert line["time"]["peak_memory_bytes"] > 0
    state = json.loads((tmp_path / "pieces/checkpoints/step-00000020/state.json").read_text())
    assert (state["scaler"] is not None) == (precision == "fp16")


@pytest.mark.gpu
@needs_gpu
def test_an_fp16_overflow_is_no_bad_batch(tmp_path):
    class Large(ToyTask):
        def loss(self, model, batch):
            loss = super().loss(model, batch)
            return type(loss)(loss.total * 1e4, loss.count)

    train(Large(), toy_config(tmp_path, device="auto", mixed_precision="fp16", max_bad_steps=1, max_steps=60))
    assert read_metrics(tmp_path / "metrics.jsonl", kind="train")


@pytest.mark.gpu
@needs_gpu
def test_a_bad_batch_is_skipped_in_bf16(tmp_path):
    task = ToyTask(bad=[3])
    train(task, toy_config(tmp_path, device="auto", mixed_precision="bf16", max_steps=8))
    assert read_metrics(tmp_path / "metrics.jsonl", kind="skipped")
    assert all(torch.isfinite(value).all() for value in task.model.state_dict().values())


@pytest.mark.gpu
@needs_gpu
def test_steps_that_are_queued_before_they_are_looked_at_are_the_same(tmp_path, monkeypatch):
    count, step_ahead = [], ahead.step_ahead
    monkeypatch.setattr("mmattn.training.step.step_ahead", lambda *given: count.append(1) or step_ahead(*given))

    def run(name):
        task = ToyTask(bad=[3])
        train(task, toy_config(tmp_path / name, device="auto", mixed_precision="bf16", max_steps=12))
        lines = read_metrics(tmp_path / name / "metrics.jsonl")
        return task.model.state_dict(), [(line["step"], line["kind"]) for line in lines]

    (queued, lines) = run("queued")
    assert len(count) == 12
    monkeypatch.setattr(ahead, "_AHEAD", ())
    looked, expected = run("looked")
    assert len(count) == 12
    assert lines == expected
    assert "skipped" in {kind for _, kind in lines}
    for name, value in looked.items():
        torch.testing.assert_close(queued[name], value, rtol=1e-3, atol=1e-4)
