from __future__ import annotations

import importlib.metadata
import platform

import pytest

from mmattn.cli.environment import cudnn_problems, devices, versions
from mmattn.cli.main import main


@pytest.mark.parametrize(("version", "shown"), [(None, ""), (91900, ""), (91500, ""), (90800, "cuDNN 9.8 is loaded")])
def test_an_old_cudnn_is_named(version: int | None, shown: str):
    problems = cudnn_problems(version)
    assert len(problems) == bool(shown)
    assert all(shown in problem for problem in problems)


def test_this_machine():
    table = dict(versions())
    assert table["python"] == platform.python_version()
    assert table["torch"] == importlib.metadata.version("torch")
    assert devices()[0].startswith("cpu: ")


def test_a_package_that_is_too_old_or_missing(monkeypatch: pytest.MonkeyPatch):
    def version(name: str) -> str:
        if name == "diffusers":
            raise importlib.metadata.PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(importlib.metadata, "requires", lambda name: ["diffusers>=0.42", "torch>=2.11"])
    monkeypatch.setattr(importlib.metadata, "version", version)
    table = dict(versions())
    assert table["diffusers"] == "NOT INSTALLED, and needed"
    assert table["torch"] == "1.0  TOO OLD, needs >=2.11"
    assert table["peft"] == "1.0"


def test_doctor(capsys):
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    for part in ("Versions:", "torch", "Devices:", "Attention backends:", "eager", "sdpa", "flex", "Known problems:"):
        assert part in shown
