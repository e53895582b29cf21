"""scripts/gpu/experiments: no card is said in a line, and what a verdict is made of."""

from __future__ import annotations

import math
import sys

import pytest
import torch

from tests.scripts import SCRIPTS, open_script

pytest.importorskip("triton")

OURS, THEIRS = ("ours, a", "ours, b"), ("eager", "eager, torch.compile")


@pytest.fixture
def experiment(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS / "gpu"))
    monkeypatch.setattr(sys, "argv", ["residual_norm.py"])
    before = set(sys.modules)
    yield open_script("gpu/experiments/experiment.py", monkeypatch)
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(SCRIPTS)):
            del sys.modules[name]


def test_no_card_is_one_line_and_status_2(experiment, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as caught:
        experiment.start("", list)
    assert caught.value.code == 2
    printed = capsys.readouterr().out
    assert printed.startswith("residual_norm.py: no CUDA card here")
    assert printed.count("\n") == 1


@pytest.mark.parametrize(
    ("times", "said"),
    [
        ({"ours, a": 7.9, "ours, b": 7.0}, "GAIN over torch.compile: 1.14 (eager, torch.compile / ours, b)"),
        ({"ours, a": 7.9, "ours, b": math.inf}, "no gain over torch.compile: 1.01 (eager, torch.compile / ours, a)"),
        # Where eager is the faster of the two, that is what has to be beaten.
        ({"ours, a": 7.0, "eager": 6.0}, "no gain over torch.compile: 0.86 (eager / ours, a)"),
        ({"ours, a": math.inf}, "none: no figure of ours"),
        ({"ours, a": 7.0, "eager, torch.compile": math.inf}, "none: no figure of torch.compile"),
    ],
)
def test_a_verdict_is_of_the_best_of_both(experiment, times, said, capsys):
    found = experiment.verdict("here", {"eager": 9.0, "eager, torch.compile": 8.0} | times, OURS, THEIRS, "cuda")
    assert found == said
    assert capsys.readouterr().out == f"verdict, here: {said}\n"


def test_what_is_not_measured_on_a_card_has_no_verdict(experiment):
    times = {"ours, a": 1.0, "eager, torch.compile": 8.0}
    assert experiment.verdict("here", times, OURS, THEIRS, "cpu") == "none: not a card"
