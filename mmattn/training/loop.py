"""The one training loop: Accelerate for device, precision and processes; exactness and safety are its own."""

from __future__ import annotations

import functools
import math
import signal
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from mmattn.errors import RunError
from mmattn.training.averaging import LastCheckpoints
from mmattn.training.batches import make_sampler, step_batches
from mmattn.training.checkpoint import CheckpointStore
from mmattn.training.config import TrainingConfig, config_dict
from mmattn.training.devices import make_accelerator, on_main
from mmattn.training.ema import ParameterAverage, replaced
from mmattn.training.lock import OutputLock
from mmattn.training.metrics import RunLog
from mmattn.training.optim import learning_rate, make_optimizer, set_learning_rate
from mmattn.training.signals import StopSignal, TrainingStoppedError
from mmattn.training.start import Start, check_continuation, find_start
from mmattn.training.state import (
    LoopState,
    frozen_checksum,
    read_facts,
    read_state,
    stored_buffers,
    trained_tensors,
    write_run_facts,
    write_state,
)
from mmattn.training.step import BufferGuard, StepResult, run_step, seed_draws
from mmattn.training.task import Batch, Task


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
    """Train `task.model` for `config.max_steps` steps.

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
    with StopSignal() as stop, OutputLock(Path(config.output_dir), enabled=accelerator.is_main_process) as lock:
        on_main(accelerator, lock.check)
        run = _Run(task, config, accelerator, stop)
        run.start(resume, command, resolved_config)
        try:
            return run.run()
        finally:
            run.close()


def _shown(metrics: dict[str, float], is_better: bool) -> str:
    return "".join(f" | {key} {value:.4f}" for key, value in metrics.items()) + " | best so far" * is_better


class _Run:
    """A run's parts, and the order in which a step, an evaluation and a save happen."""

    def __init__(self, task: Task, config: TrainingConfig, accelerator: Accelerator, stop: StopSignal) -> None:
        self.task, self.config, self.accelerator, self.stop = task, config, accelerator, stop
        self.store = CheckpointStore(config.output_dir)
        self.state = LoopState()
        self.sampler = make_sampler(task, config, accelerator.num_processes)
        self.last_checkpoints = LastCheckpoints(self.store, config) if config.average_last else None
        self.had_own_forward = "forward" in vars(task.model)
        optimizer = make_optimizer(task.model, config, accelerator.device)
        self.model, self.optimizer = accelerator.prepare(task.model, optimizer)
        self.inner = accelerator.unwrap_model(self.model)
        self.average: ParameterAverage | None = None
        if config.ema_decay is not None and accelerator.is_main_process:
            self.average = ParameterAverage(trained_tensors(self.inner), config.ema_decay)
        self.losses: list[float] = []
        self.batches: Generator[Sequence[Batch], None, None] | None = None
        self.saved_step: int | None = None

    def start(self, resume: bool | str | Path, command: str, resolved_config: dict[str, Any] | None) -> None:
        """Find and load the starting point, open the logs, say what will happen."""
        self.command, self.resolved_config = command, resolved_config
        self.facts = {
            "training": config_dict(self.config),
            "num_processes": self.accelerator.num_processes,
            "num_examples": len(self.task),
            "lengths_checksum": self.sampler.lengths_checksum(),
            "frozen_checksum": frozen_checksum(self.inner),
        }
        start = on_main(self.accelerator, lambda: find_start(self.store, resume))
        remarks = list(start.remarks)
        if start.checkpoint is not None:
            remarks += self._load(start)
        self.first_step = self.state.step
        if self.last_checkpoints is not None:
            on_main(self.accelerator, functools.partial(self.last_checkpoints.require, self.first_step))
        if self.accelerator.is_main_process:
            self.store.folder.mkdir(parents=True, exist_ok=True)
            self.store.clean()
        self.log = RunLog(self.accelerator, self.config, self.first_step, unit=self.task.unit)
        self.buffers = BufferGuard(stored_buffers(self.inner))
        for remark in [*remarks, *self._announcement()]:
            self.log.say(remark)

    def _load(self, start: Start) -> list[str]:
        assert start.checkpoint is not None
        saved = read_facts(start.checkpoint)
        remarks = check_continuation(start, saved, self.facts, self.config)
        self.state = read_state(start.checkpoint, self.inner, self.optimizer.optimizer, self.average)
        if self.accelerator.scaler is not None and self.state.scaler is not None:
            self.accelerator.scaler.load_state_dict(self.state.scaler)
        if start.is_continued:
            self.saved_step = self.state.step
        else:  # the best of another folder's run is not here to be kept
            self.state.best_step = self.state.best_value = None
        return [*remarks, f"resumed from {start.checkpoint}"]

    def _announcement(self) -> list[str]:
        parameters = list(self.inner.parameters())
        trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
        accelerator = self.accelerator
        return [
            self.task.describe(),
            f"training {trained:,} of {sum(parameter.numel() for parameter in parameters):,} parameters, steps "
            f"{self.first_step} to {self.config.max_steps}, on {accelerator.device.type}, "
            f"precision {accelerator.mixed_precision}, {self.sampler.describe()}",
            *self.sampler.remarks(),
            *([f"final/ will hold {self.last_checkpoints.describe()}"] if self.last_checkpoints is not None else []),
        ]

    def run(self) -> TrainingResult:
        """Do the steps, then publish `final/` and `best/`."""
        self.model.train()
        self.batches = self._batches()
        while self.state.step < self.config.max_steps:
            waiting = time.perf_counter()
            micro_batches = next(self.batches)
            working = time.perf_counter()
            result = self._step(micro_batches)
            self._record(result, data_s=working - waiting, step_s=time.perf_counter() - waiting)
            self._after_step(result)
        metrics, best_step, best_value = on_main(self.accelerator, self._publish)
        best = None if best_step is None else {"step": best_step, "value": best_value, "metric": self.task.best}
        return TrainingResult(self.state.step, metrics, best, self.store.output_dir, self.losses)

    def _batches(self) -> Generator[Sequence[Batch], None, None]:
        batches = step_batches(
            self.task,
            self.sampler,
            rank=self.accelerator.process_index,
            first_step=self.state.step,
            last_step=self.config.max_steps,
            num_workers=self.config.num_workers,
            pin_memory=self.accelerator.device.type == "cuda",
        )
        try:
            yield from batches
        except RuntimeError as error:
            if "DataLoader worker" in str(error) and "exited unexpectedly" in str(error):
                raise RunError(f"a data worker died at step {self.state.step}: {error}".replace("\n", " ")) from error
            raise

    def _step(self, micro_batches: Sequence[Batch]) -> StepResult:
        step = self.state.step
        seed_draws(self.config.seed, step, self.accelerator.process_index, self.accelerator.device)
        set_learning_rate(self.optimizer, learning_rate(self.config, step))
        result = run_step(
            self.task,
            self.model,
            self.optimizer,
            self.accelerator,
            micro_batches,
            max_grad_norm=self.config.max_grad_norm,
            num_scored=self.sampler.num_scored(step, self.accelerator.process_index),
            stop_signal=lambda: self.stop.received,
        )
        self.state.step += 1
        self.state.examples += self.sampler.num_draws(step)
        if result.skip_reason is None:
            self.state.tokens += result.count
            self.state.skipped_in_a_row = 0
            self.buffers.keep()
            if self.average is not None:
                self.average.update()
        else:
            self.buffers.put_back()
            self.state.skipped += 1
            self.state.skipped_in_a_row += 0 if result.is_overflow else 1
        return result

    def _record(self, result: StepResult, *, data_s: float, step_s: float) -> None:
        step = self.state.step
        clock = {
            "step_s": round(step_s, 6),
            "data_s": round(data_s, 6),
            "tokens_per_s": round(result.count / max(step_s, 1e-9), 3),
            "at": round(time.time(), 3),
        }
        if self.accelerator.device.type == "cuda":
            clock["peak_memory_bytes"] = torch.cuda.max_memory_allocated(self.accelerator.device)
        if result.skip_reason is not None:
            self._record_skip(result, clock)
            return
        rate = learning_rate(self.config, step - 1)
        self.losses.append(result.loss)
        figures = {"loss": result.loss, **result.parts, "learning_rate": rate, "grad_norm": result.grad_norm}
        counters = {"count": result.count, "examples": self.state.examples, "tokens": self.state.tokens}
        self.log.write({"kind": "train", "step": step, **figures, **counters, "time": clock})
        if step % self.config.log_every == 0 or step == self.config.max_steps:
            rates = {key: value for key, value in clock.items() if key != "at"}
            self.log.track("train", {**figures, **rates}, step)
        self.log.progress.step(
            step,
            loss=result.loss,
            learning_rate=rate,
            tokens_per_s=result.count / max(step_s, 1e-9),
            data_share=data_s / max(step_s, 1e-9),
        )

    def _record_skip(self, result: StepResult, clock: dict[str, float]) -> None:
        step = self.state.step
        suspects = [
            draw for rank, index in result.suspects for draw in self.sampler.micro_draws(step - 1, rank, index)
        ] or self.sampler.draws(step - 1)
        line = {"kind": "skipped", "step": step, "reason": result.skip_reason, "draws": suspects, "time": clock}
        self.log.write(line)
        if not result.is_overflow:
            examples = sorted({example for _, example in suspects})
            shown = ", ".join(map(str, examples[:8])) + (", ..." if len(examples) > 8 else "")
            self.log.say(f"step {step} skipped: {result.skip_reason}; examples {shown} (all in metrics.jsonl)")

    def _after_step(self, result: StepResult) -> None:
        config, step = self.config, self.state.step
        is_last = step == config.max_steps
        if self.state.skipped_in_a_row >= config.max_bad_steps:
            raise RunError(
                f"stopped at step {step}: {self.state.skipped_in_a_row} steps in a row were not finite, the last "
                f"because {result.skip_reason}; lower learning_rate or look at the examples named in "
                f"{self.store.output_dir / 'metrics.jsonl'}"
            )
        is_better = bool(config.eval_every) and (is_last or step % config.eval_every == 0) and self._evaluate()
        if is_last or is_better or result.stop_signal or (config.save_every and step % config.save_every == 0):
            self._save()
        if is_better:
            on_main(self.accelerator, self._publish_best)
        if result.stop_signal and not is_last:
            name = signal.Signals(result.stop_signal).name
            raise TrainingStoppedError(
                f"stopped by {name} after step {step}, saved in {self.store.path(step)}; continue with --resume",
                result.stop_signal,
            )

    def _evaluate(self) -> bool:
        """Evaluate with the average if there is one; whether the result is the best so far."""
        started = time.perf_counter()
        metrics = self.state.metrics = on_main(self.accelerator, self._score)
        self.model.train()
        is_better = self._is_better(metrics)
        if is_better:
            self.state.best_step, self.state.best_value = self.state.step, metrics[self.task.best or ""]
        line = {"kind": "eval", "step": self.state.step, "metrics": metrics, "is_best": is_better}
        self.log.write({**line, "time": {"eval_s": round(time.perf_counter() - started, 3)}})
        self.log.track("eval", metrics, self.state.step)
        self.log.say(f"evaluation at step {self.state.step}{_shown(metrics, is_better)}")
        return is_better

    def _is_better(self, metrics: dict[str, float]) -> bool:
        value = metrics.get(self.task.best) if self.task.best is not None else None
        if self.task.best is not None and value is None:
            raise RunError(f"evaluation gave no {self.task.best!r}, by which the best is chosen: {list(metrics)}")
        sign = 1 if self.task.is_higher_better else -1
        old = self.state.best_value
        return value is not None and math.isfinite(value) and (old is None or sign * value > sign * old)

    def _score(self) -> dict[str, float]:
        accelerator = self.accelerator
        seed_draws(self.config.seed, self.state.step, accelerator.process_index, accelerator.device, is_evaluation=True)
        self.inner.eval()
        with self._averaged(), torch.no_grad():
            metrics = {key: float(value) for key, value in self.task.evaluate(self.inner).items()}
            self.log.show(self.task.draw(self.inner), self.state.step)
            return metrics

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        with self.average.applied() if self.average is not None else nullcontext():
            yield

    def _save(self) -> None:
        if self.saved_step == self.state.step:
            return
        on_main(self.accelerator, self._save_on_main)
        self.saved_step = self.state.step

    def _save_on_main(self) -> None:
        self.log.sync()
        if self.average is not None:
            self.state.average_updates = self.average.updates
        if self.accelerator.scaler is not None:
            self.state.scaler = self.accelerator.scaler.state_dict()
        self.store.save(self.state.step, self._write_checkpoint)
        kept = {self.state.best_step} if self.state.best_step is not None else set()
        if self.last_checkpoints is not None:
            kept.update(self.last_checkpoints.until(self.state.step))
        self.store.prune(self.config.keep_last, kept)

    def _write_checkpoint(self, folder: Path) -> None:
        write_state(folder, self.state, self.facts, self.inner, self.optimizer.optimizer, self.average)
        write_run_facts(folder, self.command, self.facts["training"], self.resolved_config)
        (folder / "model").mkdir()
        with self._averaged():
            self.task.save(self.inner, folder / "model")

    def _publish(self) -> tuple[dict[str, float], int | None, float | None]:
        """Write `final/` and `best/`; the last evaluation, and step and value of the best one."""
        if self.last_checkpoints is not None:
            return self._publish_average(self.last_checkpoints)
        self.store.publish(self.store.path(self.state.step) / "model", "final")
        self._publish_best()
        return self.state.metrics, self.state.best_step, self.state.best_value

    def _publish_average(self, checkpoints: LastCheckpoints) -> tuple[dict[str, float], int | None, float | None]:
        # Nothing of this may reach the state: the run may go on with a larger max_steps.
        state, best = self.state, (self.state.best_step, self.state.best_value)
        started = time.perf_counter()
        with replaced(trained_tensors(self.inner), checkpoints.tensors()):
            final = self.store.publish_new("final", functools.partial(self.task.save, self.inner))
            metrics = self._score() if self.config.eval_every else {}
        self.inner.train()
        is_better = bool(metrics) and self._is_better(metrics)
        if is_better:
            self.store.publish(final, "best")
            best = (state.step, metrics[self.task.best or ""])
        else:
            self._publish_best()
        line = {"kind": "final", "step": state.step, "averaged_steps": checkpoints.steps, "metrics": metrics}
        self.log.write({**line, "is_best": is_better, "time": {"eval_s": round(time.perf_counter() - started, 3)}})
        self.log.track("final", metrics, state.step)
        self.log.say(f"final/ holds {checkpoints.describe()}{_shown(metrics, is_better)}")
        return metrics or state.metrics, best[0], best[1]

    def _publish_best(self) -> None:
        best = self.store.path(self.state.best_step or 0) / "model"
        if self.state.best_step is not None and best.exists():
            self.store.publish(best, "best")

    def close(self) -> None:
        """End the data workers, close the logs and take Accelerate's wrapping off the model."""
        # Workers ignore the signals that stop a run. Left to the interpreter's exit, which only terminates and waits
        # for them, they would keep it for ever: an error that somebody holds keeps them alive until then.
        if self.batches is not None:
            self.batches.close()
        self.log.close()
        if not self.had_own_forward:  # Accelerate puts its autocasting one over the class's
            vars(self.inner).pop("forward", None)
            vars(self.inner).pop("_original_forward", None)
        self.accelerator.free_memory()
