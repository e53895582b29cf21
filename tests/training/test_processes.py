"""Two real processes on gloo: the same losses as one process, and one set of files."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from mmattn.training import latest_checkpoint, read_metrics
from mmattn.training.token_sampler import TokenSampler
from tests.training.pieces import assert_whole
from tests.training.toy import RaggedTask

pytestmark = pytest.mark.slow

SCRIPT = """
import json, signal, sys, torch
from accelerate import PartialState
from mmattn.errors import MmattnError
from mmattn.training import train
from tests.training.toy import RaggedTask, toy_config

folder, options = sys.argv[1], json.loads(sys.argv[2])
bad, resume, sleep = (options.pop(key, default) for key, default in (("bad", ()), ("resume", False), ("sleep", 0)))

class Task(RaggedTask):
    def loss(self, model, batch):
        import time
        time.sleep(sleep)
        return super().loss(model, batch)

task = Task(dropout_p=0.0, dtype=torch.float64, has_batch_norm=False, bad=bad)
try:
    result = train(task, toy_config(folder, **options), resume=resume)
except MmattnError as error:
    print(f"rank {PartialState().process_index}: {error}", file=sys.stderr, flush=True)
    sys.exit(error.exit_code)
line = json.dumps({"rank": PartialState().process_index, "losses": result.losses, "best": result.best})
sys.stdout.write(line + "\\n")  # in one piece: both ranks write to one pipe
"""


def start(tmp_path, folder, processes, *, use_cpu=True, **options):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    if use_cpu:
        environment["ACCELERATE_USE_CPU"] = "true"
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return subprocess.Popen(
        [*launcher, str(script), str(folder), json.dumps(options)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def finish(process):
    out, err = process.communicate(timeout=240)
    return [json.loads(line) for line in out.splitlines() if line.startswith("{")], err, process.returncode


def test_two_processes_give_the_losses_of_one(tmp_path):
    options = {"eval_every": 10, "ema_decay": 0.9, "max_steps": 12, "save_every": 4}
    (one,), err, code = finish(start(tmp_path, tmp_path / "one", 1, **options))
    assert code == 0, err
    both, err, code = finish(start(tmp_path, tmp_path / "two", 2, micro_batch_size=2, **options))
    assert code == 0, err
    assert "batch of 6 over 2 processes in 2 micro-batches of up to 2" in err
    assert sorted(result["rank"] for result in both) == [0, 1]
    for result in both:
        assert result["losses"] == pytest.approx(one["losses"], rel=1e-9)
        assert result["best"]["value"] == pytest.approx(one["best"]["value"], rel=1e-9)
    assert_whole(tmp_path / "two")
    resumed, err, code = finish(start(tmp_path, tmp_path / "one", 2, resume=True, **{**options, "max_steps": 14}))
    assert code == 0, err
    assert len(resumed[0]["losses"]) == 2
    assert "changed, so losses agree to rounding only: num_processes: 1 -> 2" in err


@pytest.mark.parametrize("micro_batch_tokens", [None, 8])
def test_batches_by_tokens_and_the_average_do_not_depend_on_the_processes(tmp_path, micro_batch_tokens):
    options = {"batch_tokens": 9, "max_steps": 12, "save_every": 3, "average_last": 2, "eval_every": 6}
    (one,), err, code = finish(start(tmp_path, tmp_path / "one", 1, **options))
    assert code == 0, err
    both, err, code = finish(start(tmp_path, tmp_path / "two", 2, **options, micro_batch_tokens=micro_batch_tokens))
    assert code == 0, err
    assert "batches of up to 9 tokens over 2 processes" in err
    for result in both:
        assert result["losses"] == pytest.approx(one["losses"], rel=1e-9)
        assert result["best"]["value"] == pytest.approx(one["best"]["value"], rel=1e-9)
    ours, theirs = (load_file(tmp_path / name / "final/model.safetensors") for name in ("one", "two"))
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-6, atol=1e-9)
    sampler = TokenSampler(RaggedTask().lengths[:, None], 9, num_processes=2, micro_batch_tokens=micro_batch_tokens)
    assert any(sampler.num_scored(step, 1) < sampler.num_micro_batches(step) for step in range(12))  # fill-ins


def test_a_bad_example_on_one_rank_is_skipped_by_both(tmp_path):
    results, err, code = finish(start(tmp_path, tmp_path / "run", 2, bad=[3], max_steps=8, micro_batch_size=1))
    assert code == 0, err
    skipped = read_metrics(tmp_path / "run/metrics.jsonl", kind="skipped")
    assert skipped
    assert all([example for _, example in line["draws"]] == [3] for line in skipped)
    assert results[0]["losses"] == results[1]["losses"]


def test_a_failure_of_the_main_process_ends_both_with_its_line(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/thesis.tex").write_text("x")
    _, err, code = finish(start(tmp_path, tmp_path / "run", 2))
    assert code != 0
    for rank in (0, 1):
        assert f"rank {rank}: output_dir {tmp_path / 'run'} is not empty" in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the processes find each other")
def test_strangers_are_refused(tmp_path):
    _, err, code = finish(start(tmp_path, tmp_path / "run", 2, use_cpu=False, device="auto"))
    assert code != 0
    assert "2 processes were launched, but each would train alone (1 process)" in err
    assert not (tmp_path / "run").exists()


def test_a_signal_to_one_rank_stops_both_after_the_same_step(tmp_path):
    process = start(tmp_path, tmp_path / "run", 2, max_steps=2000, save_every=0, sleep=0.02)
    while process.poll() is None and len(_lines(tmp_path / "run/metrics.jsonl")) < 3:
        time.sleep(0.05)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True).stdout
    os.kill(int(children.split()[-1]), signal.SIGTERM)
    _, err, code = finish(process)
    assert code != 0
    checkpoint = latest_checkpoint(tmp_path / "run")
    assert checkpoint is not None
    for rank in (0, 1):
        assert f"rank {rank}: stopped by SIGTERM after step {int(checkpoint.name[5:])}, saved in" in err


def _lines(path):
    return path.read_text().splitlines() if path.exists() else []
