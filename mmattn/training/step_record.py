"""What is written and shown of one step."""

from __future__ import annotations

from collections.abc import Mapping

from mmattn.training.config import TrainingConfig
from mmattn.training.metrics import RunLog
from mmattn.training.optim import learning_rate
from mmattn.training.sampler import StepSampler
from mmattn.training.state import LoopState
from mmattn.training.step import StepResult


def record_step(
    log: RunLog,
    config: TrainingConfig,
    sampler: StepSampler,
    state: LoopState,
    result: StepResult,
    clock: Mapping[str, float],
) -> None:
    """Write a step's line, and show and track every `log_every`-th; `state` is that after the step."""
    step = state.step
    if result.skip_reason is not None:
        _record_skip(log, sampler, step, result, clock)
        return
    rate = learning_rate(config, step - 1)
    figures = {"loss": result.loss, **result.parts, "learning_rate": rate, "grad_norm": result.grad_norm}
    counters = {"count": result.count, "examples": state.examples, "tokens": state.tokens}
    log.write({"kind": "train", "step": step, **figures, **counters, "time": dict(clock)})
    if step % config.log_every == 0 or step == config.max_steps:
        log.track("train", {**figures, **{key: value for key, value in clock.items() if key != "at"}}, step)
    log.progress.step(step, loss=result.loss, learning_rate=rate, clock=clock)


def _record_skip(log: RunLog, sampler: StepSampler, step: int, result: StepResult, clock: Mapping[str, float]) -> None:
    suspects = [
        draw for rank, index in result.suspects for draw in sampler.micro_draws(step - 1, rank, index)
    ] or sampler.draws(step - 1)
    line = {"kind": "skipped", "step": step, "reason": result.skip_reason, "draws": suspects, "time": dict(clock)}
    log.write(line)
    if not result.is_overflow:
        examples = sorted({example for _, example in suspects})
        shown = ", ".join(map(str, examples[:8])) + (", ..." if len(examples) > 8 else "")
        log.say(f"step {step} skipped: {result.skip_reason}; examples {shown} (all in metrics.jsonl)")
