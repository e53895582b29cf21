"""Steps that are queued before they are looked at: the same steps. Played on a CPU, whose fused AdamW can do it too."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch
from accelerate import Accelerator
from torch._subclasses.fake_tensor import FakeTensorMode

from mmattn.training import TrainingStoppedError, ahead, read_metrics, train
from mmattn.training.ahead import fused_adamw
from mmattn.training.ema import ParameterAverage
from mmattn.training.gradients import Gradients
from mmattn.training.optim import make_optimizer
from tests.training.toy import ToyTask, toy_config


@pytest.fixture
def both(monkeypatch):
    """Run something as it is on a CPU, then as on a card; steps that were queued ahead the second time."""

    def run(what):
        looked = what("looked")
        count, step_ahead = [], ahead.step_ahead

        def counted(*arguments):
            count.append(1)
            return step_ahead(*arguments)

        monkeypatch.setattr(ahead, "_AHEAD", ("cpu",))
        monkeypatch.setattr("mmattn.training.step.step_ahead", counted)
        return looked, what("queued"), len(count)

    return run


def everything(folder, *, has_batch_norm=True, **options):
    """What a run comes to."""
    task = ToyTask(bad=[3], has_batch_norm=has_batch_norm)
    result = train(task, toy_config(folder, max_steps=12, **options))
    lines = read_metrics(folder / "metrics.jsonl")
    names = ("kind", "step", "loss", "grad_norm", "parts", "reason")
    seen = [{name: repr(line.get(name)) for name in names} for line in lines]
    return result.losses, {name: value.clone() for name, value in task.model.state_dict().items()}, seen


@pytest.mark.parametrize("has_batch_norm", [True, False])  # without it steps are seen one later
def test_unclipped_steps_are_the_same_bits_and_bad_ones_are_left_out(tmp_path, both, has_batch_norm):
    options = {"max_grad_norm": None, "has_batch_norm": has_batch_norm}
    (losses, weights, lines), queued, count = both(lambda name: everything(tmp_path / name, **options))
    assert count == 12
    assert (losses, lines) == (queued[0], queued[2])
    assert any("skipped" in line["kind"] for line in lines)
    assert all(torch.equal(value, queued[1][name]) for name, value in weights.items())


def test_clipped_steps_are_the_same_but_for_rounding(tmp_path, both):
    (losses, weights, _), queued, count = both(lambda name: everything(tmp_path / name, max_grad_norm=0.01))
    assert count == 12
    assert queued[0] == pytest.approx(losses, rel=1e-5)
    for name, value in weights.items():
        torch.testing.assert_close(queued[1][name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("has_batch_norm", [True, False])
def test_a_run_that_begins_with_a_bad_step_goes_on_as_it_would_after_any(tmp_path, both, has_batch_norm):
    def run(name):
        task = ToyTask(bad=range(23), has_batch_norm=has_batch_norm)  # all of them
        with pytest.raises(Exception, match="steps in a row were not finite"):
            train(task, toy_config(tmp_path / name, max_bad_steps=3))
        return {name: value.clone() for name, value in task.model.state_dict().items()}

    looked, queued, count = both(run)
    assert count == 3
    assert all(torch.equal(value, queued[name]) for name, value in looked.items())


def test_a_continued_run_is_an_unbroken_one(tmp_path, both):
    def run(name):
        whole = everything(tmp_path / name / "whole", schedule="constant")
        train(ToyTask(bad=[3]), toy_config(tmp_path / name / "cut", max_steps=5, schedule="constant"))
        task = ToyTask(bad=[3])
        train(task, toy_config(tmp_path / name / "cut", max_steps=12, schedule="constant"), resume=True)
        assert all(torch.equal(value, whole[1][key]) for key, value in task.model.state_dict().items())

    both(run)


def test_what_has_to_be_looked_at_first(monkeypatch):
    task, accelerator = ToyTask(), Accelerator(cpu=True)
    adamw = make_optimizer(task.model, toy_config("unused"), accelerator.device)
    gradients = Gradients(task.model, accelerator)
    assert fused_adamw(adamw, gradients, accelerator) is None  # a CPU
    monkeypatch.setattr(ahead, "_AHEAD", ("cpu",))
    assert fused_adamw(adamw, gradients, accelerator) is adamw
    assert fused_adamw(accelerator.prepare(adamw), gradients, accelerator) is adamw
    slow = torch.optim.AdamW(task.model.parameters(), fused=False)
    sgd = torch.optim.SGD(task.model.parameters())
    assert all(fused_adamw(other, gradients, accelerator) is None for other in (slow, sgd))

    class Pieces(Gradients):
        pass

    assert fused_adamw(adamw, Pieces(task.model, accelerator), accelerator) is None


def test_figures_are_waited_for_on_the_card_where_they_are(monkeypatch):
    recorded = []

    class Event:
        def record(self, stream=None):
            recorded.append(stream)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"of {device}")
    with FakeTensorMode():
        ahead._queue_copy(torch.empty(3, dtype=torch.float64, device="cuda:1"))
    assert recorded == ["of cuda:1"]


@pytest.fixture
def order(monkeypatch):
    """What happens to which step, in order, as on a card."""
    from mmattn.training import loop

    monkeypatch.setattr(ahead, "_AHEAD", ("cpu",))
    found, queue_step, record_step = [], loop.queue_step, loop.record_step

    def queue(*arguments, **options):
        found.append(f"queued {sum(each.startswith('queued') for each in found) + 1}")
        return queue_step(*arguments, **options)

    def record(log, config, sampler, state, *rest):
        found.append(f"seen {state.step}")
        return record_step(log, config, sampler, state, *rest)

    monkeypatch.setattr(loop, "queue_step", queue)
    monkeypatch.setattr(loop, "record_step", record)
    return found


def test_a_step_is_seen_when_the_next_one_is_queued_unless_it_is_needed_before(tmp_path, order):
    task = ToyTask(has_batch_norm=False)
    task.model.register_buffer("table", torch.ones(3))  # nobody writes to it
    train(task, toy_config(tmp_path, max_steps=6, save_every=4, eval_every=0))
    wanted = "queued 1, queued 2, seen 1, queued 3, seen 2, queued 4, seen 3, seen 4"  # saved
    assert ", ".join(order) == f"{wanted}, queued 5, queued 6, seen 5, seen 6"  # the last
    lines = [line for line in read_metrics(tmp_path / "metrics.jsonl") if line["kind"] == "train"]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    per_step = lines[0]["examples"]
    assert [line["examples"] for line in lines] == [per_step * step for step in range(1, 7)]
    assert all(line["time"]["step_s"] > 0 for line in lines)


def test_steps_that_were_taken_are_in_the_log_when_the_run_breaks(tmp_path, order):
    class Breaking(ToyTask):
        def loss(self, model, batch):
            if order[-1] == "queued 5":
                raise RuntimeError("broken")
            return super().loss(model, batch)

    with pytest.raises(RuntimeError, match="broken"):
        train(Breaking(has_batch_norm=False), toy_config(tmp_path, max_steps=9, save_every=0, eval_every=0))
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl") if line["kind"] == "train"] == [
        1,
        2,
        3,
        4,
    ]


def test_averages_and_running_statistics_follow_each_step(tmp_path, order):
    at_once = ["queued 1", "seen 1", "queued 2", "seen 2", "queued 3", "seen 3"]
    train(ToyTask(has_batch_norm=False), toy_config(tmp_path / "average", max_steps=3, ema_decay=0.9, eval_every=0))
    assert order == at_once
    order.clear()
    train(ToyTask(), toy_config(tmp_path / "statistics", max_steps=3, eval_every=0))
    assert order == at_once


def level_task(is_written):
    """A model with a buffer that a bad step spoils."""
    task = ToyTask(bad=[12], has_batch_norm=False)
    task.model.register_buffer("level", torch.zeros(()))

    def follow(model, args):
        if model.training:
            is_written(model.level, args[1].mean())

    task.model.register_forward_pre_hook(follow)
    return task


def past_the_version(level, mean):
    level.data.mul_(0.9).add_(mean)


def from_the_first_bad_step_on(level, mean):
    if mean.isnan() or level != 0:
        level.mul_(0.9).add_(mean)


@pytest.mark.parametrize("is_written", [past_the_version, from_the_first_bad_step_on])
def test_buffers_are_those_of_the_last_good_step_however_they_are_written(tmp_path, both, is_written):
    def run(name):
        task = level_task(is_written)
        train(task, toy_config(tmp_path / name, max_steps=9, save_every=0, eval_every=0, max_grad_norm=None))
        skipped = [line["step"] for line in read_metrics(tmp_path / name / "metrics.jsonl", kind="skipped")]
        return {name: value.clone() for name, value in task.model.state_dict().items()}, skipped

    (looked, skipped), (queued, _), _ = both(run)
    assert skipped[0] > 1
    assert looked["level"].isfinite()
    assert all(torch.equal(value, queued[name]) for name, value in looked.items())


def test_statistics_that_are_written_past_their_version_follow_each_step(tmp_path, order):
    train(level_task(past_the_version), toy_config(tmp_path, max_steps=3, save_every=0, eval_every=0))
    assert order == ["queued 1", "seen 1", "queued 2", "seen 2", "queued 3", "seen 3"]


@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_a_signal_stops_a_run_after_the_step_at_hand(tmp_path, order, monkeypatch, ema_decay):
    own = ahead.step_ahead

    def ahead_and_signalled(*arguments):
        read, number = own(*arguments), sum(each.startswith("queued") for each in order)

        def figures():
            if number == 2:  # comes while they are waited for
                os.kill(os.getpid(), signal.SIGTERM)
            return read()

        return figures

    monkeypatch.setattr("mmattn.training.step.step_ahead", ahead_and_signalled)
    options = {"max_steps": 9, "save_every": 0, "eval_every": 0, "ema_decay": ema_decay}
    last = 3 if ema_decay is None else 2
    with pytest.raises(TrainingStoppedError, match=f"after step {last}, saved in .*{last}; continue"):
        train(ToyTask(has_batch_norm=False), toy_config(tmp_path, **options))
    assert order[-1] == f"seen {last}"
    assert sum(each.startswith("queued") for each in order) == last


def test_a_run_that_breaks_after_a_signal_is_not_saved(tmp_path, order):
    class Breaking(ToyTask):
        def loss(self, model, batch):
            if order[-1] == "queued 3":
                os.kill(os.getpid(), signal.SIGTERM)
                raise RuntimeError("broken")
            return super().loss(model, batch)

    with pytest.raises(RuntimeError, match="broken"):
        train(Breaking(has_batch_norm=False), toy_config(tmp_path, max_steps=9, save_every=0, eval_every=0))
    assert order[-1] == "seen 2"
    assert not list((tmp_path / "checkpoints").glob("step-*"))


def test_data_is_waited_for_within_the_time_of_a_step(tmp_path, order):
    class Slow(ToyTask):
        def collate(self, draws):
            time.sleep(0.1 * (order[-1:] == ["seen 2"]))
            return super().collate(draws)

    train(Slow(has_batch_norm=False), toy_config(tmp_path, max_steps=6, save_every=0, eval_every=0))
    clocks = [line["time"] for line in read_metrics(tmp_path / "metrics.jsonl", kind="train")]
    assert max(clock["data_s"] for clock in clocks) >= 0.1
    assert all(clock["data_s"] <= clock["step_s"] for clock in clocks)


def test_averages_belong_to_the_time_of_a_step(tmp_path, monkeypatch):
    monkeypatch.setattr(ParameterAverage, "update", lambda average: time.sleep(0.05))
    train(ToyTask(), toy_config(tmp_path, max_steps=2, ema_decay=0.9, eval_every=0))
    assert all(line["time"]["step_s"] > 0.05 for line in read_metrics(tmp_path / "metrics.jsonl", kind="train"))
