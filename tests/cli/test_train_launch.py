"""Several processes on this machine, however they are launched: their number is said, and they end together."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest
import torch

from mmattn.cli.main import main
from mmattn.training import latest_checkpoint, read_metrics

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["data.size=211", "evaluation.splits=[]", "evaluation.best=null", "training.eval_every=0"]
LONG = [*SMALL, "training.max_steps=100000", "training.save_every=50", "training.log_every=1000"]
BIN = Path(sys.executable).parent


def start(command, *arguments, **environment):
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("ACCELERATE_", "OMP_"))}
    return subprocess.Popen(
        [*map(str, command), *map(str, arguments)],
        cwd=ROOT,
        env={**kept, "HF_HUB_OFFLINE": "1", **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def launched(folder, *arguments, processes=2):
    command = [sys.executable, "-m", "mmattn", "train", "translate/debug", "-n", processes, *arguments]
    return start(command, f"training.output_dir={folder}")


def finish(process, timeout=240):
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        end(process)
        raise
    return process.returncode, out, err


def end(process):
    """All of it: the processes of a run are in sessions of their own."""
    for child in ranks(process):
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def ranks(process):
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def rank(process, number):
    return next(child for child in ranks(process) if child.environ().get("RANK") == str(number))


def wait_for_steps(process, folder, number=3):
    file = folder / "metrics.jsonl"
    until = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < until:
        if file.exists() and len(file.read_text().splitlines()) >= number:
            return
        time.sleep(0.05)
    end(process)
    raise AssertionError(f"no step was made: {process.stderr.read()}")


@pytest.mark.slow
@pytest.mark.skipif(torch.accelerator.is_available(), reason="says what is said on a CPU")
@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["mmattn", "train", "translate/debug"], "on cpu, precision"),
        (["mmattn", "train", "translate/debug", "-n", "2"], "on cpu, 2 processes (gloo)"),
        (
            ["torchrun", "--standalone", "--nproc-per-node=2", "recipes/translate.py", "--config", "translate/debug"],
            "on cpu, 2 processes (gloo)",
        ),
        (
            [
                *["accelerate", "launch", "--config_file", "configs/accelerate/cpu-2.yaml", "--main_process_port=0"],
                *["recipes/translate.py", "--config", "translate/debug"],
            ],
            "on cpu, 2 processes (gloo)",
        ),
        pytest.param(
            [
                *["accelerate", "launch", "--config_file", "configs/accelerate/zero3-8.yaml", "--num_processes=2"],
                *["--mixed_precision=no", "--main_process_port=0"],
                *["recipes/translate.py", "--config", "translate/debug"],
            ],
            "cut by DeepSpeed's ZeRO-3 over 2 processes",
            marks=pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed"),
        ),
    ],
    ids=["plain", "-n 2", "torchrun", "accelerate launch", "accelerate launch with DeepSpeed"],
)
def test_each_way_says_how_many_processes_there_are(command, said, tmp_path):
    overrides = [f"training.output_dir={tmp_path}/run", "training.max_steps=2", *SMALL]
    # Accelerate's launcher lets DeepSpeed look for a GPU by itself, which says on stdout what it found.
    process = start([BIN / command[0], *command[1:]], *overrides, DS_ACCELERATOR="cpu")
    code, out, err = finish(process)
    assert code == 0, err
    assert err.count(said) == 1
    assert out == f"done: step 2; written to {tmp_path}/run\n"
    assert len(read_metrics(tmp_path / "run/metrics.jsonl", kind="train")) == 2


@pytest.mark.slow
def test_accelerate_that_starts_one_process_of_two_is_refused(tmp_path):
    command = [BIN / "accelerate", "launch", "--cpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no"]
    command += ["--dynamo_backend=no", "recipes/translate.py", "--config", "translate/debug"]
    code, _, err = finish(start(command, f"training.output_dir={tmp_path}/run", *SMALL))
    assert code != 0
    assert "mmattn: accelerate was asked for several processes and started one, as it does with --cpu" in err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_to_the_launcher_stops_and_saves_all(number, code, tmp_path):
    process = launched(tmp_path / "run", *LONG)
    wait_for_steps(process, tmp_path / "run")
    process.send_signal(number)
    result, _, err = finish(process, 60)
    checkpoint = latest_checkpoint(tmp_path / "run")
    assert checkpoint is not None, err
    assert err.splitlines()[-1] == (
        f"mmattn: stopped by {number.name} after step {int(checkpoint.name[5:])}, saved in {checkpoint}; "
        "continue with --resume"
    )
    assert result == code
    assert "Traceback" not in err


@pytest.mark.slow
def test_a_killed_process_ends_the_other_in_seconds(tmp_path):
    process = launched(tmp_path / "run", *LONG)
    wait_for_steps(process, tmp_path / "run")
    rank(process, 1).kill()
    killed = time.monotonic()
    code, _, err = finish(process, 60)
    assert time.monotonic() - killed < 20
    assert code == 1
    last = "mmattn: process 1 of 2 was killed by SIGKILL (out of memory?), and the others were ended: go on with"
    assert err.splitlines()[-1].startswith(last)
    assert "Traceback" not in err


@pytest.mark.slow
def test_a_killed_process_under_torchrun_ends_the_other_in_seconds(tmp_path):
    command = [BIN / "torchrun", "--standalone", "--nproc-per-node=2", "recipes/translate.py", "-c", "translate/debug"]
    process = start(command, f"training.output_dir={tmp_path}/run", *LONG)
    wait_for_steps(process, tmp_path / "run")
    rank(process, 1).kill()
    killed = time.monotonic()
    code, _, err = finish(process, 60)
    assert time.monotonic() - killed < 20
    assert code == 1
    assert "mmattn: lost another of the 2 processes after step" in err


@pytest.mark.slow
def test_processes_whose_launcher_is_killed_save_and_stop(tmp_path):
    process = launched(tmp_path / "run", *LONG)
    wait_for_steps(process, tmp_path / "run")
    left = ranks(process)
    process.kill()
    _, _, err = finish(process, 60)  # until both have closed their end of stderr
    _, alive = psutil.wait_procs(left, timeout=10)
    assert not alive
    assert "the launcher has gone: stopping" in err
    assert latest_checkpoint(tmp_path / "run") is not None


@pytest.mark.slow
def test_processes_stop_though_whoever_reads_them_has_gone_too(tmp_path):
    process = launched(tmp_path / "run", *LONG)
    wait_for_steps(process, tmp_path / "run")
    left = ranks(process)
    process.stderr.close()
    process.kill()
    _, alive = psutil.wait_procs(left, timeout=40)
    assert not alive
    assert latest_checkpoint(tmp_path / "run") is not None


@pytest.mark.slow
def test_a_refusal_of_all_processes_is_said_once(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/thesis.tex").write_text("x")
    code, _, err = finish(launched(tmp_path / "run", *SMALL))
    assert code == 2
    assert err.count("is not empty: choose another output_dir") == 1
    assert err.splitlines()[-1].startswith("mmattn: output_dir")


def test_a_wrong_config_is_said_before_anything_is_launched(capfd):
    assert main(["train", "translate/debug", "-n", "2", "training.max_step=3"]) == 2
    assert capfd.readouterr().err.count("unknown key 'training.max_step'. Did you mean 'training.max_steps'?") == 1


def test_two_launchers_are_refused(monkeypatch, capfd):
    monkeypatch.setenv("RANK", "0")
    assert main(["train", "translate/debug", "-n", "2"]) == 2
    assert "mmattn: -n 2: another launcher has started this process (RANK is set)" in capfd.readouterr().err


def test_more_processes_than_gpus_are_refused(monkeypatch, capfd):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    assert main(["train", "translate/debug", "-n", "2"]) == 2
    assert "-n 2 needs as many devices, and this machine has 1: use -n 1, or training.device=cpu" in (
        capfd.readouterr().err
    )
