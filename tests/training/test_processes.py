"""Two real processes on gloo: the same losses as one process, and one set of files."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from mmattn.training import latest_checkpoint, read_metrics
from mmattn.training.token_sampler import TokenSampler
from tests.ranks import Ranks
from tests.training.layered_toy import launch
from tests.training.pieces import assert_whole
from tests.training.ranked_toy import train_toy
from tests.training.toy import RaggedTask

pytestmark = pytest.mark.slow


def start(tmp_path, folder, processes, **options):
    return Ranks(tmp_path / "said", train_toy, folder, options, processes=processes)


def finish(ranks, *, is_whole=True):
    """What each process came to, and all that was said on stderr. Not `is_whole`: every process has to fail."""
    ended = ranks.end()
    err = "".join(one.err for one in ended)
    assert all((one.code == 0) == is_whole for one in ended), err
    return [json.loads(line) for one in ended for line in one.out.splitlines() if line.startswith("{")], err


def test_two_processes_give_the_losses_of_one(tmp_path):
    options = {"eval_every": 10, "ema_decay": 0.9, "max_steps": 12, "save_every": 4}
    (one,), err = finish(start(tmp_path, tmp_path / "one", 1, **options))
    both, err = finish(start(tmp_path, tmp_path / "two", 2, micro_batch_size=2, **options))
    assert "batch of 6 over 2 processes in 2 micro-batches of up to 2" in err
    assert sorted(result["rank"] for result in both) == [0, 1]
    for result in both:
        assert result["losses"] == pytest.approx(one["losses"], rel=1e-9)
        assert result["best"]["value"] == pytest.approx(one["best"]["value"], rel=1e-9)
    assert_whole(tmp_path / "two")
    resumed, err = finish(start(tmp_path, tmp_path / "one", 2, resume=True, **{**options, "max_steps": 14}))
    assert len(resumed[0]["losses"]) == 2
    assert "changed, so losses agree to rounding only: num_processes: 1 -> 2" in err


def test_parameters_that_take_no_part_end_all_before_gradients_of_one_process_are_used(tmp_path):
    one_step = {"max_steps": 1, "micro_batch_size": 1}
    runs = [
        (tmp_path / "unused", {**one_step, "task": {"kind": "UnusedTask"}}),
        (tmp_path / "lately", {**one_step, "task": {"kind": "LatelyUnusedTask"}}),
        (tmp_path / "after", {**one_step, "task": {}}),
    ]
    for unused, lately, after in launch(runs, 2):
        assert re.match(r"spare.weight, spare.bias took no part in the last micro-batch.*: freeze", unused["error"])
        assert re.match(r"a parameter took no part in the last micro-batch.*: freeze", lately["error"])
        assert len(after["losses"]) == 1
    assert not list(tmp_path.glob("*ly/checkpoints/step-*"))


@pytest.mark.parametrize("micro_batch_tokens", [None, 8])
def test_batches_by_tokens_and_the_average_do_not_depend_on_the_processes(tmp_path, micro_batch_tokens):
    options = {"batch_tokens": 9, "max_steps": 12, "save_every": 3, "average_last": 2, "eval_every": 6}
    (one,), err = finish(start(tmp_path, tmp_path / "one", 1, **options))
    both, err = finish(start(tmp_path, tmp_path / "two", 2, **options, micro_batch_tokens=micro_batch_tokens))
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
    results, _ = finish(start(tmp_path, tmp_path / "run", 2, bad=[3], max_steps=8, micro_batch_size=1))
    skipped = read_metrics(tmp_path / "run/metrics.jsonl", kind="skipped")
    assert skipped
    assert all([example for _, example in line["draws"]] == [3] for line in skipped)
    assert results[0]["losses"] == results[1]["losses"]


def test_a_failure_of_the_main_process_ends_both_with_its_line(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/thesis.tex").write_text("x")
    _, err = finish(start(tmp_path, tmp_path / "run", 2), is_whole=False)
    for rank in (0, 1):
        assert f"rank {rank}: output_dir {tmp_path / 'run'} is not empty" in err


def test_losses_of_4_processes_are_those_of_one_and_go_on_with_two_and_one(tmp_path):
    options = {"batch_size": 12, "micro_batch_size": 2, "save_every": 4}
    losses = []
    for processes, max_steps in ((4, 4), (2, 8), (1, 12)):
        options["resume"] = processes != 4
        changed = {"schedule": "constant", "warmup_steps": 12}  # the rate does not depend on max_steps
        results, _ = finish(start(tmp_path, tmp_path / "several", processes, max_steps=max_steps, **options, **changed))
        assert len(results) == processes
        losses += results[0]["losses"]
    options.pop("resume")
    (one,), _ = finish(start(tmp_path, tmp_path / "plain", 1, max_steps=12, **options, **changed))
    assert losses == pytest.approx(one["losses"], rel=1e-9)


def test_batch_norm_is_over_the_examples_of_all_processes(tmp_path):
    options = {"batch_norm": True, "max_steps": 9, "eval_every": 3, "bad": [5]}
    runs = [finish(start(tmp_path, tmp_path / str(number), number, **options)) for number in (1, 2, 3)]
    (one,) = runs[0][0]
    assert len(one["losses"]) < 9  # one with the bad example was skipped
    tensors = [load_file(tmp_path / f"{number}/final/model.safetensors") for number in (1, 2, 3)]
    for (results, _), theirs in zip(runs[1:], tensors[1:], strict=True):
        assert results[0]["losses"] == pytest.approx(one["losses"], rel=1e-9)
        assert results[0]["best"]["value"] == pytest.approx(one["best"]["value"], rel=1e-9)
        for name, tensor in tensors[0].items():
            torch.testing.assert_close(tensor, theirs[name], rtol=1e-7, atol=1e-9)


def test_too_many_bad_steps_stop_all_with_one_reason(tmp_path):
    _, err = finish(start(tmp_path, tmp_path / "run", 2, bad=list(range(23)), max_bad_steps=3), is_whole=False)
    for rank in (0, 1):
        assert f"rank {rank}: stopped at step 3: 3 steps in a row were not finite, the last because the loss is" in err


def test_a_dead_data_worker_of_one_process_ends_all(tmp_path):
    ranks = start(tmp_path, tmp_path / "run", 2, dies=11, num_workers=1, max_steps=2000)
    started = time.monotonic()
    _, err = finish(ranks, is_whole=False)
    assert time.monotonic() - started < 60
    assert "rank 1: a data worker died at step" in err
    assert "rank 0: lost another of the 2 processes after step" in err


@pytest.mark.parametrize(
    ("stop", "when"),
    [({"stop_in_evaluation": True}, "in the evaluation after"), ({"stop_other_at": 3}, "after")],
    ids=["in the evaluation", "the other process in the step before"],
)
def test_a_signal_in_an_evaluation_or_the_step_before_stops_all(tmp_path, stop, when):
    _, err = finish(start(tmp_path, tmp_path / "run", 2, **stop, eval_every=3, max_steps=9), is_whole=False)
    for rank in (0, 1):
        assert f"rank {rank}: stopped by SIGTERM {when} step 3, saved in" in err
    assert not read_metrics(tmp_path / "run/metrics.jsonl", kind="eval")
    _, err = finish(start(tmp_path, tmp_path / "run", 2, resume=True, eval_every=3, max_steps=9))
    assert [line["step"] for line in read_metrics(tmp_path / "run/metrics.jsonl", kind="eval")] == [3, 6, 9]


def _can_mount():
    command = ["unshare", "-Urm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    return shutil.which("unshare") and subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not _can_mount(), reason="needs a file system of its own, by unshare")
def test_a_full_disk_ends_all_and_keeps_the_checkpoint(tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    # Inside, one run fills its disk; after room was made, another goes on.
    inside = f"""mount -t tmpfs -o size=2m tmpfs {small}
        "$@" && exit 9
        ls {small}/run/checkpoints >&2
        rm {small}/filler
        cp -r {small}/run {tmp_path}/kept"""
    options = {"fill_at": 3, "save_every": 5, "max_steps": 20}
    command = [
        *["unshare", "-Urm", "bash", "-euc", inside, "bash"],
        *[sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"],
        *["-m", "tests.training.ranked_toy", str(small / "run"), json.dumps(options)],
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    err = done.stderr
    assert done.returncode == 0, err
    said = (
        f"cannot save {small}/run/checkpoints/step-00000015: the disk is full; the checkpoint of step 10 is kept; "
        "make room, then go on with --resume"
    )
    for rank in (0, 1):
        assert f"rank {rank}: {said}" in err
    assert err.splitlines()[-2:] == ["step-00000005", "step-00000010"]
    assert_whole(tmp_path / "kept")
    both, err = finish(start(tmp_path, tmp_path / "kept", 2, resume=True, save_every=5, max_steps=20))
    assert len(both[0]["losses"]) == 10


def test_a_signal_to_one_rank_stops_both_after_the_same_step(tmp_path):
    ranks = start(tmp_path, tmp_path / "run", 2, max_steps=2000, save_every=0, sleep=0.02)
    while ranks.are_running() and len(_lines(tmp_path / "run/metrics.jsonl")) < 3:
        time.sleep(0.05)
    ranks.send_signal(1, signal.SIGTERM)
    _, err = finish(ranks, is_whole=False)
    checkpoint = latest_checkpoint(tmp_path / "run")
    assert checkpoint is not None
    for rank in (0, 1):
        assert f"rank {rank}: stopped by SIGTERM after step {int(checkpoint.name[5:])}, saved in" in err


def _lines(path):
    return path.read_text().splitlines() if path.exists() else []
