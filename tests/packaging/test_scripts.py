"""The shell scripts, as far as they can be tried without an installation."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = [*sorted((ROOT / "scripts").glob("*.sh")), ROOT / ".ci" / "run"]


def _bash(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", code], cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True
    )


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_syntax(script: Path):
    assert _bash(f"bash -n '{script}'").returncode == 0


@pytest.mark.parametrize("script", ["quickstart.sh", "test.sh"])
def test_no_usable_python_is_a_clear_message(script: str, tmp_path: Path):
    """In a copy, so that there is no .venv yet."""
    (tmp_path / "scripts").mkdir()
    for name in ("install.sh", script):
        shutil.copy(ROOT / "scripts" / name, tmp_path / "scripts" / name)
    done = _bash(f"bash '{tmp_path}/scripts/{script}'", PYTHON="/bin/false")
    assert (done.returncode, done.stderr) == (1, "error: PYTHON=/bin/false is not a Python 3.11 or newer\n")
    assert not (tmp_path / ".venv").exists()


def test_python_is_found():
    done = _bash("source scripts/install.sh; find_python", PYTHON="")
    assert done.returncode == 0
    assert "python" in done.stdout


@pytest.mark.parametrize(("listing", "pinned"), [("GPU 0: NVIDIA H100 (UUID: x)", False), ("", True)])
def test_torch_is_pinned_only_without_a_gpu(listing: str, pinned: bool, tmp_path: Path):
    fake = tmp_path / "nvidia-smi"
    fake.write_text(f"#!/bin/sh\necho '{listing}'\n")
    fake.chmod(0o755)
    words = "source scripts/install.sh; set_pip_options; echo ${options[*]}"
    done = _bash(words, PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert ("constraints-cpu.txt" in done.stdout) == pinned


def test_constraints_pin_torch_and_never_torchvision():
    lines = (ROOT / "scripts" / "constraints-cpu.txt").read_text().splitlines()
    assert [line for line in lines if not line.startswith("#")] == ["torch==2.13.0"]


@pytest.mark.parametrize(
    ("script", "usage"), [("scenes_steer.py", "MODEL_RUN [PICTURES]"), ("scenes_kv.py", "MODEL_RUN WORK_FOLDER")]
)
def test_accept_scripts_without_arguments_say_usage(script: str, usage: str):
    command = [sys.executable, str(ROOT / "scripts" / "accept" / script)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith(f"usage: {script} [-h] {usage}\n")
    assert "Traceback" not in done.stderr
