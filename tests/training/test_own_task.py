"""The task that the documentation shows is trained, resumed, and learns."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors.torch import load_file

from mmattn.training import TrainingConfig, train

PAGE = Path(__file__).parents[2] / "docs/training.md"


def test_the_task_of_the_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    section = PAGE.read_text().split("## A task of your own")[1]
    found = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert found is not None
    names: dict = {}
    torch.manual_seed(0)
    exec(compile(found[1], str(PAGE), "exec"), names)
    run = tmp_path / "runs/regression"
    assert load_file(run / "final/model.safetensors").keys() == names["task"].model.state_dict().keys()
    result = train(
        names["task"],
        TrainingConfig(str(run), max_steps=80, batch_size=16, learning_rate=0.01, device="auto"),
        resume=True,
    )
    assert len(result.losses) == 30
    assert sum(result.losses[-5:]) / 5 < 0.5
