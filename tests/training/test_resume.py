"""A run in pieces, however they end, equals an unbroken one bit for bit."""

from __future__ import annotations

import functools
import itertools
import multiprocessing
import os
import random
import signal
import time

import pytest
import torch
from safetensors.torch import load_file

from mmattn.training import TrainingStoppedError, latest_checkpoint, read_metrics, train
from mmattn.training.state import read_facts
from tests.training.pieces import KilledTask, assert_whole, kill_at_call, run_in_child, run_piece, timeless_lines
from tests.training.toy import RaggedTask, ToyTask, toy_config

OPTIONS = {"max_steps": 40, "save_every": 7, "eval_every": 10, "ema_decay": 0.9, "micro_batch_size": 4}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    run_piece(folder, resume=False, **OPTIONS)
    return folder


def assert_equal_runs(folder, unbroken):
    assert timeless_lines(folder) == timeless_lines(unbroken)
    for name in ("final", "best"):
        ours, theirs = (load_file(run / name / "model.safetensors") for run in (folder, unbroken))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_killed_twice_equals_unbroken(tmp_path, unbroken, num_workers):
    for at_call in (33, 29):
        task = KilledTask(at_call)
        piece = functools.partial(
            run_piece, tmp_path, resume=at_call != 33, task=task, num_workers=num_workers, **OPTIONS
        )
        assert run_in_child(piece) == -signal.SIGKILL
        assert_whole(tmp_path)
    result = run_piece(tmp_path, resume=True, num_workers=num_workers, **OPTIONS)
    assert result.step == 40
    assert len(result.losses) == 40 - 21
    assert_equal_runs(tmp_path, unbroken)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_killed_with_batches_by_tokens_equals_unbroken(tmp_path, num_workers):
    options = {**OPTIONS, "micro_batch_size": None, "batch_tokens": 20, "micro_batch_tokens": 8}

    def piece(name, at_call=None, *, resume=False, workers=0):  # in children, which all have as many threads
        task = KilledTask(at_call)
        task.lengths, task.collate = RaggedTask().lengths, RaggedTask().collate
        run = functools.partial(run_piece, tmp_path / name, resume=resume, task=task, num_workers=workers, **options)
        return run_in_child(run)

    assert piece("unbroken") == 0
    for at_call in (45, 33):
        assert piece("pieces", at_call, resume=at_call != 45, workers=num_workers) == -signal.SIGKILL
        assert_whole(tmp_path / "pieces")
    assert piece("pieces", resume=True, workers=num_workers) == 0
    assert timeless_lines(tmp_path / "unbroken")[-2]["examples"] > 3 * 23  # several epochs
    assert_equal_runs(tmp_path / "pieces", tmp_path / "unbroken")


def test_killed_at_random_steps(tmp_path, unbroken):
    draws = random.Random(3)
    for piece in range(6):
        task = KilledTask(draws.randrange(1, 40))
        code = run_in_child(functools.partial(run_piece, tmp_path, resume=piece > 0, task=task, **OPTIONS))
        assert code in (-signal.SIGKILL, 0)
        assert_whole(tmp_path)
    run_piece(tmp_path, resume=True, **OPTIONS)
    assert_equal_runs(tmp_path, unbroken)


@pytest.mark.parametrize("after", [False, True])
def test_killed_inside_saves(tmp_path, unbroken, after):
    """Piece n dies at its n-th fsync or rename: every one of a save's is met, of a publication's too."""

    def piece(number):
        kill_at_call(["fsync", "rename"], number, after=after)
        run_piece(tmp_path, resume=number > 1, **OPTIONS)

    for number in itertools.count(1):
        code = run_in_child(functools.partial(piece, number))
        assert_whole(tmp_path)
        if code == 0:
            break
        assert code == -signal.SIGKILL
    assert number > 14  # a save alone has as many
    assert_equal_runs(tmp_path, unbroken)
    assert not list(tmp_path.rglob(".tmp-*"))


def test_sigterm_saves_the_step_and_exits_143(tmp_path, unbroken):
    piece = functools.partial(run_piece, tmp_path, resume=False, task=KilledTask(17, signal.SIGTERM), **OPTIONS)
    assert run_in_child(piece) == 143
    checkpoint = latest_checkpoint(tmp_path)
    assert checkpoint is not None
    assert checkpoint.name == "step-00000009"  # two micro-batches a step
    run_piece(tmp_path, resume=True, **OPTIONS)
    assert_equal_runs(tmp_path, unbroken)


def test_sigint_says_how_to_continue(tmp_path):
    before = signal.getsignal(signal.SIGINT)  # a shell's background job ignores it
    with pytest.raises(
        TrainingStoppedError, match=r"stopped by SIGINT after step 3, saved in .*step-00000003; continue with --resume"
    ) as caught:
        train(KilledTask(3, signal.SIGINT), toy_config(tmp_path))
    assert caught.value.exit_code == 130
    assert signal.getsignal(signal.SIGINT) is before


def test_a_terminal_that_is_closed_stops_a_run_but_for_nohup(tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert train(KilledTask(3, signal.SIGHUP), toy_config(tmp_path / "nohup", max_steps=4)).step == 4
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        with pytest.raises(TrainingStoppedError, match="stopped by SIGHUP after step 3, saved in") as caught:
            train(KilledTask(3, signal.SIGHUP), toy_config(tmp_path / "run"))
        assert caught.value.exit_code == 129
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


def test_data_workers_end_with_the_run_even_if_its_error_is_kept(tmp_path):
    with pytest.raises(TrainingStoppedError) as kept:
        train(KilledTask(3, signal.SIGTERM), toy_config(tmp_path, num_workers=1))
    assert kept.value.exit_code == 143
    assert not multiprocessing.active_children()


def test_max_steps_may_grow(tmp_path, capsys):
    options = {"schedule": "constant", "save_every": 0}
    train(ToyTask(), toy_config(tmp_path / "long", max_steps=20, **options))
    train(ToyTask(), toy_config(tmp_path / "grown", max_steps=8, **options))
    train(ToyTask(), toy_config(tmp_path / "grown", max_steps=20, **options), resume=True)
    assert timeless_lines(tmp_path / "grown") == timeless_lines(tmp_path / "long")
    assert "changed: max_steps: 8 -> 20" in capsys.readouterr().err


def test_the_global_generators_do_not_matter(tmp_path, unbroken):
    torch.manual_seed(12345)
    task = ToyTask()
    torch.rand(100)
    run_piece(tmp_path, resume=False, task=task, **OPTIONS)
    assert_equal_runs(tmp_path, unbroken)


class SlowlyScoredTask(ToyTask):
    """Is sent a signal in the n-th evaluation, or the n-th save of the model, and would then take a minute."""

    def __init__(self, where=None, at_call=0, number=signal.SIGTERM, pause_s=60.0):
        super().__init__()
        self.where, self.at_call, self.number, self.pause_s, self.calls = where, at_call, number, pause_s, 0

    def _called(self, where):
        if where == self.where:
            self.calls += 1
            if self.calls == self.at_call:
                os.kill(os.getpid(), self.number)
                time.sleep(self.pause_s)

    def evaluate(self, model):
        self._called("evaluate")
        return super().evaluate(model)

    def save(self, model, folder):
        self._called("save")
        super().save(model, folder)


def test_sigterm_in_an_evaluation_saves_at_once_and_evaluates_on_resume(tmp_path, unbroken):
    started = time.monotonic()
    for call, step in ((2, 20), (1, 20), (3, 40)):  # the second piece is stopped in the evaluation that it resumes with
        task = SlowlyScoredTask("evaluate", call)
        assert run_in_child(functools.partial(run_piece, tmp_path, resume=call != 2, task=task, **OPTIONS)) == 143
        checkpoint = latest_checkpoint(tmp_path)
        assert checkpoint is not None
        assert checkpoint.name == f"step-{step:08d}"
        assert_whole(tmp_path)
    assert time.monotonic() - started < 50
    run_piece(tmp_path, resume=True, **OPTIONS)
    assert_equal_runs(tmp_path, unbroken)


@pytest.mark.parametrize("step", [20, 40])
def test_sigterm_in_the_step_before_an_evaluation_leaves_that_to_the_resume(tmp_path, unbroken, step):
    class Unscored(KilledTask):
        def evaluate(self, model):
            assert self.at_call is not None
            assert self.calls < self.at_call, "an evaluation was begun after the signal"
            return super().evaluate(model)

    last_call = 2 * step + step // 10 - 1  # two micro-batches a step, one in each evaluation
    with pytest.raises(TrainingStoppedError, match=f"stopped by SIGTERM after step {step}, saved in .*-000000{step};"):
        run_piece(tmp_path, resume=False, task=Unscored(last_call, signal.SIGTERM), **OPTIONS)
    assert read_facts(tmp_path / f"checkpoints/step-000000{step}")["is_evaluation_due"]
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl", kind="eval")] == [*range(10, step, 10)]
    run_piece(tmp_path, resume=True, **OPTIONS)
    assert_equal_runs(tmp_path, unbroken)
    newest, old = (read_facts(run / "checkpoints/step-00000040") for run in (tmp_path, unbroken))
    assert newest == {**old, "training": newest["training"]}  # output_dir
    assert not list(tmp_path.glob("checkpoints/*.replaced"))


def test_killed_after_the_evaluation_that_was_made_again(tmp_path, unbroken):
    task = SlowlyScoredTask("evaluate", 1)
    assert run_in_child(functools.partial(run_piece, tmp_path, resume=False, task=task, **OPTIONS)) == 143
    task = KilledTask(3)
    assert run_in_child(functools.partial(run_piece, tmp_path, resume=True, task=task, **OPTIONS)) == -signal.SIGKILL
    run_piece(tmp_path, resume=True, **OPTIONS)
    assert_equal_runs(tmp_path, unbroken)


def test_sigterm_in_a_save_ends_after_the_next_step(tmp_path, unbroken):
    task = SlowlyScoredTask("save", 2, pause_s=0)
    assert run_in_child(functools.partial(run_piece, tmp_path, resume=False, task=task, **OPTIONS)) == 143
    checkpoint = latest_checkpoint(tmp_path)
    assert checkpoint is not None
    assert checkpoint.name == "step-00000011"  # the second save was that of the evaluation at step 10
    assert_whole(tmp_path)
    run_piece(tmp_path, resume=True, **OPTIONS)
    assert_equal_runs(tmp_path, unbroken)


def test_what_is_said_of_a_stopped_evaluation(tmp_path):
    with pytest.raises(TrainingStoppedError) as caught:
        train(SlowlyScoredTask("evaluate", 1, signal.SIGINT), toy_config(tmp_path, eval_every=3))
    assert str(caught.value) == (
        f"stopped by SIGINT in the evaluation after step 3, saved in {tmp_path}/checkpoints/step-00000003; "
        "continue with --resume"
    )
    assert caught.value.exit_code == 130
