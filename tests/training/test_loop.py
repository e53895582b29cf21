"""What a run does besides its steps: skipping, evaluating, keeping, telling."""

from __future__ import annotations

import io
import json
import os
import shutil

import pytest
import torch
from accelerate.tracking import TensorBoardTracker
from safetensors.torch import load_file

from mmattn.errors import RunError, UsageError
from mmattn.training import batches, read_metrics, train
from mmattn.training.metrics import MetricsLog, Progress
from mmattn.training.recipe_settings import SCORES_AND_PATHS
from tests.ranks import Ranks
from tests.training.toy import ToyTask, toy_config


def test_it_learns_and_writes_what_it_promises(tmp_path):
    result = train(ToyTask(), toy_config(tmp_path, eval_every=5, ema_decay=0.9))
    assert result.step == len(result.losses) == 20
    assert result.losses[-1] < 0.8 * result.losses[0]
    lines = read_metrics(tmp_path / "metrics.jsonl", kind="train")
    assert [line["loss"] for line in lines] == result.losses
    assert [line["step"] for line in lines] == list(range(1, 21))
    assert {"learning_rate", "grad_norm", "count", "examples", "tokens", "half"} <= lines[0].keys()
    clock = lines[0]["time"]
    assert {"step_s", "data_s", "tokens_per_s", "steps_per_s", "left_s"} <= clock.keys()
    assert clock["peak_memory_bytes"] > 50 * 2**20
    assert "mfu" not in clock  # on a CPU
    assert lines[-1]["examples"] == 120
    assert lines[-1]["tokens"] == sum(line["count"] for line in lines)
    evaluations = read_metrics(tmp_path / "metrics.jsonl", kind="eval")
    assert [line["step"] for line in evaluations] == [5, 10, 15, 20]
    assert result.metrics == evaluations[-1]["metrics"]
    best = min(evaluations, key=lambda line: line["metrics"]["loss"])
    assert result.best == {"step": best["step"], "value": best["metrics"]["loss"], "metric": "loss"}


def test_final_has_the_averaged_weights_and_the_state_their_own(tmp_path):
    task = ToyTask()
    train(task, toy_config(tmp_path, ema_decay=0.9))
    checkpoint = tmp_path / "checkpoints/step-00000020"
    final, average = load_file(tmp_path / "final/model.safetensors"), load_file(checkpoint / "average.safetensors")
    own = load_file(checkpoint / "trained.safetensors")
    assert torch.equal(final["head.weight"], average["head.weight"])
    assert torch.equal(own["head.weight"], task.model.head.weight)
    assert not torch.equal(own["head.weight"], final["head.weight"])


def test_only_what_requires_grad_moves(tmp_path):
    task = ToyTask()
    before = {name: value.clone() for name, value in task.model.state_dict().items()}
    train(task, toy_config(tmp_path, max_steps=3))
    moved = {name for name, value in task.model.state_dict().items() if not torch.equal(value, before[name])}
    assert not any(name.startswith("frozen_proj") for name in moved)
    assert {"head.weight", "token_embedding.weight"} <= moved


class ScriptedTask(ToyTask):
    """Evaluates to the scores given, in order."""

    best, is_higher_better = "score", True

    def __init__(self, scores):
        super().__init__()
        self.scores = list(scores)

    def evaluate(self, model):
        assert not model.training
        assert not torch.is_grad_enabled()
        return {"score": self.scores.pop(0)}


def test_the_best_is_kept_beside_the_newest(tmp_path):
    task = ScriptedTask([0.1, 0.7, 0.7, float("nan"), 0.2])
    result = train(task, toy_config(tmp_path, max_steps=10, eval_every=2, save_every=2, keep_last=1))
    assert result.best == {"step": 4, "value": 0.7, "metric": "score"}
    kept = sorted(path.name for path in tmp_path.glob("checkpoints/*"))
    assert kept == ["step-00000004", "step-00000010"]
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("best", f"checkpoints/{kept[0]}/model")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert task.model.training


def test_an_evaluation_without_the_best_metric_is_said(tmp_path):
    task = ScriptedTask([0.1])
    task.best = "accuracy"
    before, after = ({"evaluation": {"best": name, "limit": 3}} for name in ("accuracy", "score"))
    task.free_settings = SCORES_AND_PATHS
    with pytest.raises(
        RunError, match=r"gave no 'accuracy', by which the best is chosen: name one of \['score'\]"
    ) as caught:
        train(task, toy_config(tmp_path, max_steps=4, eval_every=2), resolved_config=before)
    assert str(caught.value).endswith("and go on from step 2, which is saved, with --resume")
    task = ScriptedTask([0.3, 0.5])
    task.free_settings = SCORES_AND_PATHS
    result = train(task, toy_config(tmp_path, max_steps=4, eval_every=2), resume=True, resolved_config=after)
    assert result.best == {"step": 4, "value": 0.5, "metric": "score"}
    assert not task.scores  # that of step 2 was made up for
    config = toy_config(tmp_path, max_steps=6, eval_every=2)
    with pytest.raises(UsageError, match=r"other settings \(evaluation.best: score -> accuracy\)"):
        train(task, config, resume=True, resolved_config=before)


def test_the_average_of_the_last_steps_without_the_best_metric_is_said(tmp_path):
    config = toy_config(tmp_path, max_steps=4, eval_every=2, save_every=2, average_last=2)
    train(ScriptedTask([0.1, 0.2, 0.3]), config)
    task = ScriptedTask([0.3])  # of the average alone: all steps are done
    task.best = "accuracy"
    with pytest.raises(RunError, match="gave no 'accuracy', by which the best is chosen: .* step 4, which is saved"):
        train(task, config, resume=True)
    result = train(ScriptedTask([0.3]), config, resume=True)
    assert result.best == {"step": 4, "value": 0.3, "metric": "score"}


def test_a_bad_batch_is_skipped_counted_and_named(tmp_path, capsys):
    task = ToyTask(bad=[3])
    train(task, toy_config(tmp_path, max_steps=8, batch_size=6, micro_batch_size=2))
    skipped = read_metrics(tmp_path / "metrics.jsonl", kind="skipped")
    assert skipped
    for line in skipped:
        assert line["reason"] == "the loss is nan"
        assert len(line["draws"]) == 2  # the micro-batch that it is in
        assert 3 in [example for _, example in line["draws"]]
    steps = [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")]
    assert steps == list(range(1, 9))
    assert "skipped: the loss is nan; examples" in capsys.readouterr().err
    assert all(torch.isfinite(value).all() for value in task.model.state_dict().values())
    state = json.loads((tmp_path / "checkpoints/step-00000008/state.json").read_text())
    assert state["skipped"] == len(skipped)


def test_too_many_bad_batches_stop_the_run(tmp_path):
    task = ToyTask(bad=range(23))
    with pytest.raises(
        RunError, match="stopped at step 3: 3 steps in a row were not finite, the last because the loss"
    ):
        train(task, toy_config(tmp_path, max_bad_steps=3))
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 3


def test_a_full_disk_while_saving_ends_the_run_with_the_previous_checkpoint(tmp_path, monkeypatch):
    class Filling(ToyTask):
        def save(self, model, folder):
            if "00000010" in str(folder):
                raise OSError(28, "No space left on device")
            super().save(model, folder)

    with pytest.raises(RunError, match="the disk is full; the checkpoint of step 5 is kept") as caught:
        train(Filling(), toy_config(tmp_path))
    assert caught.value.exit_code == 1
    assert sorted(path.name for path in tmp_path.glob("checkpoints/*")) == ["step-00000005"]
    assert train(ToyTask(), toy_config(tmp_path), resume=True).step == 20


def test_a_log_that_does_not_reach_the_disk_ends_the_run_with_the_previous_checkpoint(tmp_path, monkeypatch):
    def failing(log):
        if log.path.read_text().count("\n") == 10:
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(MetricsLog, "sync", failing)
    with pytest.raises(RunError) as caught:
        train(ToyTask(), toy_config(tmp_path))
    assert str(caught.value) == (
        f"cannot save {tmp_path}/checkpoints/step-00000010: [Errno 5] Input/output error; the checkpoint of step 5 is "
        "kept; make room, then go on with --resume"
    )


def test_a_dead_data_worker_is_said(tmp_path):
    class Dying(ToyTask):
        def collate(self, draws):
            os._exit(3)

    with pytest.raises(RunError, match=r"a data worker died at step 0: DataLoader worker .* exited unexpectedly"):
        train(Dying(), toy_config(tmp_path, num_workers=1))


def test_a_data_worker_that_dies_while_it_hands_over_a_batch_is_said(tmp_path, monkeypatch):
    def lost(loader):
        raise ConnectionResetError(104, "Connection reset by peer")
        yield

    monkeypatch.setattr(batches.DataLoader, "__iter__", lost)
    with pytest.raises(RunError, match=r"a data worker died at step 0: DataLoader worker .* ConnectionResetError\(104"):
        train(ToyTask(), toy_config(tmp_path, num_workers=1))


class CutTask(ToyTask):
    def collate(self, draws):
        raise ConnectionResetError("the shard's server")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_connection_that_the_task_has_lost_is_no_dead_data_worker(tmp_path, num_workers):
    with pytest.raises(ConnectionResetError, match="the shard's server"):
        train(CutTask(), toy_config(tmp_path, num_workers=num_workers))


def _train_cut(folder):
    train(CutTask(), toy_config(folder, num_workers=2))


def test_an_error_in_a_data_worker_does_not_keep_a_process_from_ending(tmp_path):
    (ended,) = Ranks(tmp_path, _train_cut, tmp_path / "run", processes=1).end(60)
    assert ended.code == 1
    assert "ConnectionResetError: Caught ConnectionResetError in DataLoader worker process" in ended.err


def test_a_log_that_fills_the_disk_is_said_in_a_line(tmp_path, monkeypatch):
    def opened(log, *args, **kwargs):
        begin(log, *args, **kwargs)
        log.close()
        log._file = open("/dev/full", "a")  # noqa: SIM115 (closed by the run)

    begin = MetricsLog.__init__
    monkeypatch.setattr(MetricsLog, "__init__", opened)
    with pytest.raises(RunError, match=r"cannot write .*metrics.jsonl: No space left on device; make room, then go on"):
        train(ToyTask(), toy_config(tmp_path))


def test_tensorboard_shows_no_step_twice_after_a_kill(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = toy_config(tmp_path, trackers=["tensorboard"], log_every=1, max_steps=8)
    train(ToyTask(), config)
    shutil.rmtree(tmp_path / "checkpoints/step-00000008")  # as if killed before
    train(ToyTask(), config, resume=True)
    shown = accumulator.EventAccumulator(str(tmp_path / "trackers/mmattn"))
    assert [event.step for event in shown.Reload().Scalars("train/loss")] == list(range(1, 9))


def test_tensorboard_receives_the_figures_and_does_not_end_a_run(tmp_path, monkeypatch, capsys):
    pytest.importorskip("tensorboard")
    received = []

    def log(tracker, values, step):
        if step > 6:
            raise OSError(28, "No space left on device")
        received.append(step)
        own(tracker, values, step=step)

    own = TensorBoardTracker.log
    monkeypatch.setattr(TensorBoardTracker, "log", log)
    train(ToyTask(), toy_config(tmp_path, trackers=["tensorboard"], log_every=3, eval_every=10))
    assert list((tmp_path / "trackers").rglob("events.out.tfevents*"))
    assert received == [3, 6]
    assert len(read_metrics(tmp_path / "metrics.jsonl", kind="train")) == 20
    line = "tensorboard gets no more figures of this run ([Errno 28] No space left on device): all of them stand in"
    assert capsys.readouterr().err.count(line) == 1

    monkeypatch.setattr(TensorBoardTracker, "start", lambda tracker: 1 / 0)
    with pytest.raises(UsageError, match=r"training.trackers=tensorboard cannot be started \(division by zero\): mend"):
        train(ToyTask(), toy_config(tmp_path / "new", trackers=["tensorboard"]))


def test_bf16_where_it_is_asked_for_leaves_the_model_as_it_was(tmp_path):
    task = ToyTask()
    result = train(task, toy_config(tmp_path, mixed_precision="bf16", max_steps=3))
    assert len(result.losses) == 3
    assert task.model.head.weight.dtype == torch.float32
    assert "forward" not in vars(task.model)  # Accelerate's wrapper is gone


def test_metrics_beyond_the_checkpoint_and_half_lines_go(tmp_path):
    log = MetricsLog(tmp_path, keep_to_step=0)
    for step in (1, 2, 3):
        log.write({"kind": "train", "step": step, "loss": float("inf") if step == 2 else 0.5})
    log.close()
    with open(log.path, "a") as file:
        file.write('{"kind": "train", "st')
    assert [line["loss"] for line in read_metrics(log.path)] == [0.5, "inf", 0.5]
    MetricsLog(tmp_path, keep_to_step=2).close()
    assert [line["step"] for line in read_metrics(log.path)] == [1, 2]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_console_that_is_gone_does_not_end_a_run():
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as stream:
        progress = Progress(0, 4, log_every=1, enabled=True, stream=stream)
        progress.say("to nobody")
        progress.step(1, loss=1.0, learning_rate=0.1, clock={})
        progress.close()
    assert not progress.enabled


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()])
def test_the_console_shows_loss_rate_and_time_left(stream):
    progress = Progress(0, 4, log_every=2, enabled=True, stream=stream)
    for step in range(1, 5):
        clock = {"step_s": 2, "data_s": 0.5, "tokens_per_s": 1234.5, "steps_per_s": 0.5, "peak_memory_bytes": 7 * 2**20}
        progress.step(step, loss=1.25, learning_rate=1e-3, clock={**clock, "left_s": 61 * (4 - step), "mfu": 0.41})
    progress.say("a remark")
    progress.close()
    text = stream.getvalue()
    assert "loss 1.2500 | lr 1.00e-03 | 1,234 tokens/s | data 25% | 7 MiB | MFU 41%" in text
    assert "a remark\n" in text
    if not stream.isatty():
        assert [line.split(" | ")[0] for line in text.splitlines()] == ["step 2/4", "step 4/4", "a remark"]
        assert "0.50 steps/s | 2m02s left\n" in text
