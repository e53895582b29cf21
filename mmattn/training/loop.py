"""The one training loop: Accelerate for device, precision and processes; exactness and safety are its own."""

from __future__ import annotations

import functools
import signal
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from torch import Tensor

from mmattn.errors import RunError
from mmattn.training.averaging import LastCheckpoints
from mmattn.training.batch_norm import shared_batch_norm
from mmattn.training.batches import make_sampler, step_batches
from mmattn.training.checkpoint import CheckpointStore, model_folder
from mmattn.training.checkpoint_writer import CheckpointWriter, RunFacts
from mmattn.training.config import TrainingConfig, config_dict
from mmattn.training.devices import describe_processes, make_accelerator, on_main
from mmattn.training.kept_memory import kept_memory, memory_remarks
from mmattn.training.launcher_sharding import resolve_sharding
from mmattn.training.lock import OutputLock
from mmattn.training.metrics import RunLog
from mmattn.training.optim import learning_rate, set_learning_rate
from mmattn.training.peers import deaths_said
from mmattn.training.publish import how_to_export, is_better, missing_best, publish_best
from mmattn.training.rates import Rates
from mmattn.training.recipe_settings import recipe_changes
from mmattn.training.shardings import prepare_model
from mmattn.training.signals import EvaluationInterrupted, StopSignal, TrainingStoppedError
from mmattn.training.start import Start, check_continuation, find_start
from mmattn.training.state import LoopState, read_facts, stored_buffers, trained_dtypes
from mmattn.training.step import BufferGuard, QueuedStep, StepResult, queue_step, seed_draws
from mmattn.training.step_record import record_step
from mmattn.training.task import Batch, Task
from mmattn.training.window_sampler import stream_facts


@dataclass(frozen=True)
class TrainingResult:
    """What a run came to.

    Attributes:
        step: Steps done, counted over all the pieces of the run.
        metrics: The last evaluation: with `average_last` the average's.
        best: Step, value and metric of the best evaluation, or None; the average counts as one of the last step.
        output_dir: Holds `final/`, `best/`, `checkpoints/` and `metrics.jsonl`.
        losses: Loss of each step of this piece of the run, skipped ones left out.
    """

    step: int
    metrics: dict[str, float]
    best: dict[str, Any] | None
    output_dir: Path
    losses: list[float] = field(default_factory=list)


def train(
    task: Task,
    config: TrainingConfig,
    *,
    resume: bool | str | Path = False,
    command: str = "",
    resolved_config: dict[str, Any] | None = None,
) -> TrainingResult:
    """Train `task.model` for `config.max_steps` steps; with sharding copies of it, so that the result is what is saved.

    Args:
        task: What to train and on what.
        config: The settings.
        resume: True continues the run in `config.output_dir` from its newest checkpoint, exactly. A checkpoint, or
            another run's folder, starts a new run from there.
        command: The command line, written beside every checkpoint.
        resolved_config: The recipe's whole configuration, written beside every checkpoint.

    Raises:
        UsageError: for settings, folders and checkpoints that do not fit, before any step.
        TrainingStoppedError: after SIGTERM or SIGINT, when the step at hand is finished and saved.
        RunError: too many non-finite steps in a row, a full disk, a dead data worker.
    """
    config.validate()
    accelerator = make_accelerator(config)
    with (
        StopSignal() as stop,
        OutputLock(Path(config.output_dir), enabled=accelerator.is_main_process) as lock,
        shared_batch_norm(task.model, accelerator.num_processes),
        kept_memory(accelerator.device),
    ):
        on_main(accelerator, lock.check)
        run = _Run(task, config, accelerator, stop)
        with deaths_said(accelerator.num_processes, config.output_dir, lambda: run.state.step):
            try:
                run.start(resume, command, resolved_config)
                return run.run()
            finally:  # where torch may still tell of a data worker that has died
                run.close()


def _shown(metrics: dict[str, float], is_best: bool) -> str:
    return "".join(f" | {key} {value:.4f}" for key, value in metrics.items()) + " | best so far" * is_best


@dataclass(frozen=True)
class _Queued:
    """A step that nobody has looked at yet: its number, and the examples up to it."""

    step: QueuedStep
    number: int
    examples: int


class _Run:
    """A run's parts, and the order in which a step, an evaluation and a save happen."""

    def __init__(self, task: Task, config: TrainingConfig, accelerator: Accelerator, stop: StopSignal) -> None:
        self.task, self.config, self.accelerator, self.stop = task, config, accelerator, stop
        self.store = CheckpointStore(config.output_dir)
        self.state = LoopState()
        self.sampler = make_sampler(task, config, accelerator.num_processes)
        self.last_checkpoints = LastCheckpoints(self.store, config) if config.average_last else None
        self.sharding = resolve_sharding(config.sharding)
        with ExitStack() as closing:  # a refusal takes off what stands already
            self.prepared = prepare_model(self.sharding, task, config, accelerator, closing)
            self.closing = closing.pop_all()
        self.model, self.optimizer, self.average = self.prepared.model, self.prepared.optimizer, self.prepared.average
        self.losses: list[float] = []
        self.queued: list[_Queued] = []
        self.clock_began = self.waited_s = 0.0

    def start(self, resume: bool | str | Path, command: str, resolved_config: dict[str, Any] | None) -> None:
        """Find and load the starting point, open the logs, say what will happen."""
        compared = {
            "training": config_dict(self.config),
            "num_processes": self.accelerator.num_processes,
            "num_examples": len(self.task),
            "lengths_checksum": self.sampler.lengths_checksum(),
            "stream": stream_facts(self.task.stream),
            "frozen_checksum": self.prepared.frozen_checksum,
            "dtype": trained_dtypes(self.prepared.inner),
            "arithmetic": f"{self.accelerator.mixed_precision} on {self.accelerator.device.type}",
            "sharding": self.sharding,
        }
        self.checkpoints = CheckpointWriter(
            self.task,
            self.config,
            self.accelerator,
            self.store,
            self.prepared,
            self.last_checkpoints,
            RunFacts(command, resolved_config, compared),
        )
        start = on_main(self.accelerator, lambda: find_start(self.store, resume))
        remarks = list(start.remarks)
        if start.checkpoint is not None:
            remarks += self._load(start)
        self.first_step = self.state.step
        if self.last_checkpoints is not None:
            on_main(self.accelerator, functools.partial(self.last_checkpoints.require, self.first_step))
        on_main(self.accelerator, self.store.prepare)
        is_continued = start.is_continued
        self.log = RunLog(self.accelerator, self.config, self.state, unit=self.task.unit, is_continued=is_continued)
        self.closing.callback(self.log.close)
        self.buffers = BufferGuard(stored_buffers(self.prepared.inner))
        # On the main process, which says them: elsewhere the task's model may be in pieces.
        for remark in [*remarks, *self._announcement()] if self.accelerator.is_main_process else []:
            self.log.say(remark)

    def _load(self, start: Start) -> list[str]:
        assert start.checkpoint is not None
        saved, facts = read_facts(start.checkpoint), self.checkpoints.facts
        has_best = saved["best_step"] is not None
        recipe = recipe_changes(start.checkpoint, facts.resolved_config, self.task.free_settings, has_best=has_best)
        remarks = check_continuation(start, saved, facts.compared, self.config, recipe)
        self.state = self.prepared.load(start.checkpoint)
        if self.accelerator.scaler is not None and self.state.scaler is not None:
            self.accelerator.scaler.load_state_dict(self.state.scaler)
        if start.is_continued:
            is_saved_as_asked = self.config.sharded_checkpoints or model_folder(start.checkpoint) is not None
            self.checkpoints.saved_step = self.state.step if is_saved_as_asked else None
        else:  # the best of another folder's run is not here to be kept
            self.state.best_step = self.state.best_value = None
            self.state.is_evaluation_due = False
        return [*remarks, f"resumed from {start.checkpoint}"]

    def _announcement(self) -> list[str]:
        parameters = list(self.prepared.plain.parameters())
        trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
        accelerator = self.accelerator
        return [
            self.task.describe(),
            f"training {trained:,} of {sum(parameter.numel() for parameter in parameters):,} parameters, steps "
            f"{self.first_step} to {self.config.max_steps}, on {describe_processes(accelerator)}, "
            f"precision {accelerator.mixed_precision}, {self.sampler.describe()}",
            *([self.prepared.describe()] if self.prepared.describe() else []),
            *self.sampler.remarks(),
            *memory_remarks(accelerator.device),
            *([f"final/ will hold {self.last_checkpoints.describe()}"] if self.last_checkpoints is not None else []),
        ]

    def run(self) -> TrainingResult:
        """Do the steps, then publish `final/` and `best/`."""
        self.model.train()
        batches = self._batches()
        # Workers ignore the signals that stop a run. Left to the interpreter's exit, which only terminates and waits
        # for them, they would keep it for ever: an error that somebody holds keeps them alive until then.
        self.closing.callback(batches.close)
        self.rates = Rates(self.accelerator, self.first_step, self.config.max_steps)
        if self.rates.remark is not None:
            self.log.say(self.rates.remark)
        if self.state.is_evaluation_due:
            self._finish_step(stop_signal=0)
        try:
            while self.state.step < self.config.max_steps:
                self._take_step(batches)
        except BaseException:
            with suppress(Exception):  # a step that was taken is in the log, whatever has ended the run
                self._see_queued()
            raise
        self.checkpoints.save(self.state, self.log)
        metrics, best_step, best_value = on_main(self.accelerator, self._publish)
        best = None if best_step is None else {"step": best_step, "value": best_value, "metric": self.task.best}
        return TrainingResult(self.state.step, metrics, best, self.store.output_dir, self.losses)

    def _batches(self) -> Generator[Sequence[Batch], None, None]:
        yield from step_batches(
            self.task,
            self.sampler,
            rank=self.accelerator.process_index,
            first_step=self.state.step,
            last_step=self.config.max_steps,
            num_workers=self.config.num_workers,
            pin_memory=self.accelerator.device.type == "cuda",
        )

    def _take_step(self, batches: Iterator[Sequence[Batch]]) -> None:
        """Queue a step, and finish the one before; this one too, where something has to be known of it at once."""
        waiting = time.perf_counter()
        if not self.queued:
            self.clock_began, self.waited_s = waiting, 0.0
        micro_batches = next(batches)
        self.waited_s += time.perf_counter() - waiting
        with self.rates.counted():
            step = self._queue_step(micro_batches)
        queued = _Queued(step, self.state.step, self.state.examples)
        if self._must_see(step):
            self.queued.append(queued)
            self._finish_queued()
        else:
            self._finish_queued()
            self.queued.append(queued)
            if self.stop.received:  # meanwhile: the step at hand is the last
                self._finish_queued()

    def _queue_step(self, micro_batches: Sequence[Batch]) -> QueuedStep:
        step = self.state.step
        seed_draws(self.config.seed, step, self.accelerator.process_index, self.accelerator.device)
        set_learning_rate(self.optimizer, learning_rate(self.config, step))
        queued = queue_step(
            self.task,
            self.model,
            self.optimizer,
            self.accelerator,
            micro_batches,
            max_grad_norm=self.config.max_grad_norm,
            gradients=self.prepared.gradients,
            num_scored=self.sampler.num_scored(step, self.accelerator.process_index),
            stop_signal=lambda: self.stop.received,
        )
        self.state.step += 1
        self.state.examples += self.sampler.num_draws(step)
        return queued

    def _must_see(self, queued: QueuedStep) -> bool:
        """Does anything depend on the step at hand before the next one may be queued?"""
        config, step = self.config, self.state.step
        if not queued.is_waiting or queued.stop_signal or self.average is not None or self.buffers.are_written():
            return True
        not_finite = self.state.skipped_in_a_row + len(self.queued) + 1  # at most
        may_be_last = step == config.max_steps or not_finite >= config.max_bad_steps
        return may_be_last or any(every and step % every == 0 for every in (config.eval_every, config.save_every))

    def _finish_queued(self) -> None:
        """See the steps that nobody has looked at yet, and do what is due after them."""
        stop_signal = self._see_queued()
        if stop_signal is not None:
            self._finish_step(stop_signal)

    def _see_queued(self) -> int | None:
        """Count and record the steps that nobody has looked at yet; the stop signal, where the newest is among them."""
        steps, self.queued = self.queued, []
        if not steps:
            return None
        results = [queued.step.result() for queued in steps]
        seen = [self._count(queued, result) for queued, result in zip(steps, results, strict=True)]
        now = time.perf_counter()
        # Of steps that are looked at together nobody knows when the first one ended. Where one is looked at late, what
        # was waited for meanwhile is the next one's data.
        step_s, data_s = (now - self.clock_began) / len(steps), self.waited_s / len(steps)
        self.clock_began, self.waited_s = now, 0.0
        for state, result in zip(seen, results, strict=True):
            self._record(state, result, data_s=data_s, step_s=step_s)
        return results[-1].stop_signal if steps[-1].number == self.state.step else None

    def _count(self, queued: _Queued, result: StepResult) -> LoopState:
        """Count a step; the state after it."""
        # An older one has written nothing to the buffers, or it would have been looked at; the newest may have.
        is_newest = queued.number == self.state.step
        if result.skip_reason is None:
            self.state.tokens += result.count
            self.state.skipped_in_a_row = 0
            if is_newest:
                self.buffers.keep()
            if self.average is not None:
                self.average.update()
        else:
            if is_newest:
                self.buffers.put_back()
            self.state.skipped += 1
            self.state.skipped_in_a_row += 0 if result.is_overflow else 1
        return replace(self.state, step=queued.number, examples=queued.examples)

    def _record(self, state: LoopState, result: StepResult, *, data_s: float, step_s: float) -> None:
        clock = self.rates.clock(state.step, result.count, data_s=data_s, step_s=step_s)
        record_step(self.log, self.config, self.sampler, state, result, clock)
        if result.skip_reason is None:
            self.losses.append(result.loss)
        if state.skipped_in_a_row >= self.config.max_bad_steps:
            raise RunError(
                f"stopped at step {state.step}: {state.skipped_in_a_row} steps in a row were not finite, the "
                f"last because {result.skip_reason}; lower learning_rate or look at the examples named in "
                f"{self.store.output_dir / 'metrics.jsonl'}"
            )

    def _finish_step(self, stop_signal: int) -> None:
        """Evaluate, save and stop, each where it is time for it."""
        config, step = self.config, self.state.step
        is_last = step == config.max_steps
        has_evaluation = bool(config.eval_every) and (is_last or step % config.eval_every == 0)
        # An evaluation may take longer than a scheduler waits; the main process need not have got the signal.
        self.state.is_evaluation_due = has_evaluation and bool(stop_signal)
        is_best = has_evaluation and not stop_signal and self._evaluate()
        if is_last or is_best or stop_signal or (config.save_every and step % config.save_every == 0):
            self.checkpoints.save(self.state, self.log)
        if is_best and not is_last and not config.sharded_checkpoints:
            on_main(self.accelerator, self._publish_best)
        if stop_signal and (has_evaluation or not is_last):
            self._stop(stop_signal, "after")

    def _stop(self, number: int, when: str) -> NoReturn:
        where, name = self.store.path(self.state.step), signal.Signals(number).name
        text = f"stopped by {name} {when} step {self.state.step}, saved in {where}; continue with --resume"
        raise TrainingStoppedError(text, number)

    def _evaluate(self) -> bool:
        """Evaluate with the average if there is one; whether the result is the best so far."""
        started = time.perf_counter()
        full = self.prepared.full_state(has_optimizer=False)
        metrics = on_main(self.accelerator, lambda: self._score_or_stop(self.prepared.to_hold(full)))
        self.model.train()
        self.state.is_evaluation_due = isinstance(metrics, int)
        if isinstance(metrics, int):
            self.checkpoints.save(self.state, self.log)
            self._stop(metrics, "in the evaluation after")
        self.state.metrics = metrics
        self.checkpoints.saved_step = None  # a checkpoint of this step, from before a stop, does not know the outcome
        self._require_best(metrics)
        is_best = is_better(self.task, metrics, self.state.best_value)
        if is_best:
            self.state.best_step, self.state.best_value = self.state.step, metrics[self.task.best or ""]
        line = {"kind": "eval", "step": self.state.step, "metrics": metrics, "is_best": is_best}
        self.log.write({**line, "time": {"eval_s": round(time.perf_counter() - started, 3)}})
        self.log.track("eval", metrics, self.state.step)
        self.log.say(f"evaluation at step {self.state.step}{_shown(metrics, is_best)}")
        return is_best

    def _require_best(self, metrics: dict[str, float]) -> None:
        if problem := missing_best(self.task, metrics, self.state.step):
            self.state.is_evaluation_due = True  # a misspelt metric does not cost the steps so far
            self.checkpoints.save(self.state, self.log)
            raise RunError(problem)

    def _score_or_stop(self, tensors: dict[str, Tensor]) -> dict[str, float] | int:
        """The scores, or the signal that came before they were complete."""
        try:
            return self._score(tensors, self.stop.interrupting())
        except EvaluationInterrupted:
            return self.stop.received

    def _score(self, tensors: dict[str, Tensor], guard: AbstractContextManager[None] | None = None) -> dict[str, float]:
        accelerator, model = self.accelerator, self.prepared.plain
        seed_draws(self.config.seed, self.state.step, accelerator.process_index, accelerator.device, is_evaluation=True)
        model.eval()
        # Inside all others: nothing may interrupt the way back to the trained weights.
        with self.prepared.holding(tensors), torch.no_grad(), guard or nullcontext():
            metrics = {key: float(value) for key, value in self.task.evaluate(model).items()}
            self.log.show(self.task.draw(model), self.state.step)
            return metrics

    def _publish(self) -> tuple[dict[str, float], int | None, float | None]:
        """Write `final/` and `best/`; the last evaluation, and step and value of the best one."""
        if self.last_checkpoints is not None:
            return self._publish_average(self.last_checkpoints)
        model = model_folder(self.store.path(self.state.step))
        if model is None:
            self.log.say(how_to_export(self.store))
        else:
            self.store.publish(model, "final")
            self._publish_best()
        return self.state.metrics, self.state.best_step, self.state.best_value

    def _publish_average(self, checkpoints: LastCheckpoints) -> tuple[dict[str, float], int | None, float | None]:
        # Nothing of this may reach the state: the run may go on with a larger max_steps.
        state, best = self.state, (self.state.best_step, self.state.best_value)
        started = time.perf_counter()
        with self.prepared.holding(checkpoints.tensors()):
            final = self.store.publish_new("final", functools.partial(self.task.save, self.prepared.plain))
            metrics = self._score({}) if self.config.eval_every else {}
        self.model.train()
        if metrics:
            self._require_best(metrics)
        is_best = bool(metrics) and is_better(self.task, metrics, state.best_value)
        if is_best:
            self.store.publish(final, "best")
            best = (state.step, metrics[self.task.best or ""])
        else:
            self._publish_best()
        line = {"kind": "final", "step": state.step, "averaged_steps": checkpoints.steps, "metrics": metrics}
        self.log.write({**line, "is_best": is_best, "time": {"eval_s": round(time.perf_counter() - started, 3)}})
        self.log.track("final", metrics, state.step)
        self.log.say(f"final/ holds {checkpoints.describe()}{_shown(metrics, is_best)}")
        return metrics or state.metrics, best[0], best[1]

    def _publish_best(self) -> None:
        if self.state.best_step is not None and (remark := publish_best(self.store, self.state.best_step)):
            self.log.say(remark)

    def close(self) -> None:
        """End the data workers, close the logs and take Accelerate's wrapping off the model, where it came to them."""
        self.closing.close()
        self.accelerator.free_memory()
