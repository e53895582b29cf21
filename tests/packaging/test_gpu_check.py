"""scripts/gpu_check.sh: no card is said in a line, and a part that fails or hangs costs its own rows only."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ADD = "import json, sys; print(json.dumps({'table': 'T', 'cells': {'a': 1, 'b': 'x|y'}}), file=open(sys.argv[1], 'a'))"
PARTS = {
    "tests": ADD,
    "attention": f"{ADD}; raise ValueError('no kernel')",
    "translator": "import time; print('begun', flush=True); time.sleep(60)",
    "vlm": ADD,
}


@pytest.fixture
def runner(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts" / "gpu"))
    spec = importlib.util.spec_from_file_location("gpu_check_run", ROOT / "scripts" / "gpu" / "run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "LIMITS", dict.fromkeys(PARTS, 1.5))
    monkeypatch.setattr(module, "command", lambda part, options, rows: [sys.executable, "-c", PARTS[part], str(rows)])
    yield module
    sys.modules.pop("report", None)


def test_a_full_page_even_if_parts_fail(runner, monkeypatch, tmp_path, capsys):
    output = tmp_path / "new" / "gpu.md"
    monkeypatch.setattr(sys, "argv", ["run.py", "--device", "cpu", "--output", str(output), "--seconds", "6"])
    assert runner.main() == 1
    printed = capsys.readouterr().out
    assert "== attention: FAILED (exit status 1)" in printed
    assert "ValueError: no kernel" in printed
    assert "== translator: FAILED (not done in " in printed
    assert "== vlm: ok" in printed
    text = output.read_text()
    assert text.count("| 1 | x/y |\n") == 3
    assert "| attention | **failed: exit status 1** |" in text
    assert "`ValueError: no kernel`" in text
    assert "| torch |" in text
    assert "scripts/gpu_check.sh --quick" in text


def test_all_well_is_status_0(runner, monkeypatch, tmp_path):
    arguments = ["run.py", "--device", "cpu", "--output", str(tmp_path / "gpu.md"), "--part", "vlm"]
    monkeypatch.setattr(sys, "argv", arguments)
    assert runner.main() == 0


def test_marked_tests_are_found(runner):
    assert "tests/gpu" in runner.test_files()
    assert "tests/training/test_gpu.py" in runner.test_files()


@pytest.mark.parametrize("chosen", ["", sys.executable])
def test_no_card_is_one_line_and_status_2(chosen, tmp_path):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": ""}
    environment["MMATTN_PYTHON"] = chosen
    done = subprocess.run(["bash", "scripts/gpu_check.sh"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout.startswith("gpu_check.sh: no CUDA card here")
    assert done.stdout.count("\n") == 1


def test_a_python_that_is_not_there_is_said():
    done = subprocess.run(
        ["bash", "scripts/gpu_check.sh"],
        cwd=ROOT,
        env=os.environ | {"MMATTN_PYTHON": "/no/python"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (
        1,
        "error: MMATTN_PYTHON=/no/python cannot import torch (or is not there)\n",
    )
