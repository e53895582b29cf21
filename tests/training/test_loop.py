from __future__ import annotations

from mmattn.training import read_metrics, train
from tests.training.toy import ToyTask, toy_config


def test_it_learns_and_writes_what_it_promises(tmp_path):
    task = ToyTask()
    result = train(task, toy_config(tmp_path, eval_every=5, ema_decay=0.9), command="mmattn train toy")
    assert result.step == 20
    assert len(result.losses) == 20
    assert result.losses[-1] < 0.8 * result.losses[0]
    assert result.best is not None
    assert (tmp_path / "final/model.safetensors").exists()
    assert (tmp_path / "best/model.safetensors").exists()
    assert [line["loss"] for line in read_metrics(tmp_path / "metrics.jsonl", kind="train")] == result.losses
