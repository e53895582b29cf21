"""One optimiser step: micro-batches to gradients, over all processes, and whether they may be used."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device
from torch import Tensor, nn

from mmattn.errors import UsageError
from mmattn.training.ahead import fused_adamw, step_ahead
from mmattn.training.devices import sum_over_processes
from mmattn.training.gradients import Gradients
from mmattn.training.optim import StepOptimizer
from mmattn.training.task import Batch, Loss, Task
from mmattn.training.tensor_rows import own_rows

_SMALLEST_SCALE = 1.0  # of an fp16 loss


@dataclass(frozen=True)
class StepResult:
    """A step over all processes.

    Attributes:
        loss: Sum of the losses divided by `count`.
        count: Scored tokens.
        grad_norm: Norm of the gradient before clipping.
        parts: The parts' means.
        skip_reason: Why the parameters were left alone, or None.
        is_overflow: Skipped because the fp16 loss scale was too large, which is no fault of the data.
        suspects: (process, micro-batch) of the non-finite losses.
        stop_signal: The largest stop signal that any process has received, or 0.
    """

    loss: float
    count: int
    grad_norm: float
    parts: dict[str, float] = field(default_factory=dict)
    skip_reason: str | None = None
    is_overflow: bool = False
    suspects: list[tuple[int, int]] = field(default_factory=list)
    stop_signal: int = 0


def seed_draws(seed: int, step: int, rank: int, device: torch.device, *, is_evaluation: bool = False) -> None:
    """Seed torch for a step, so that dropout is a function of (seed, step, process) and needs no saved state."""
    words = np.random.SeedSequence([seed, step, rank, 2 if is_evaluation else 1]).generate_state(1, np.uint64)
    value = int(words[0] >> np.uint64(1))
    # Not torch.manual_seed: it queues a call, with a stack trace, for every kind of device that is never used.
    torch.default_generator.manual_seed(value)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(value)


class QueuedStep:
    """A step that is on its way: its loss and its norm are known once a card has computed them.

    Args:
        finish: Waits for them; called once.
        stop_signal: The largest stop signal that any process had received when the step was queued, or 0.
        is_waiting: Whether there is anything to wait for.
    """

    def __init__(self, finish: Callable[[], StepResult], stop_signal: int, *, is_waiting: bool) -> None:
        self._finish, self.stop_signal, self.is_waiting = finish, stop_signal, is_waiting

    def result(self) -> StepResult:
        """Wait for the figures."""
        return self._finish()


def run_step(
    task: Task,
    model: nn.Module,
    optimizer: StepOptimizer,
    accelerator: Accelerator,
    micro_batches: Sequence[Batch],
    **options: Any,
) -> StepResult:
    """`queue_step`, and its result."""
    return queue_step(task, model, optimizer, accelerator, micro_batches, **options).result()


def queue_step(
    task: Task,
    model: nn.Module,
    optimizer: StepOptimizer,
    accelerator: Accelerator,
    micro_batches: Sequence[Batch],
    *,
    max_grad_norm: float | None,
    gradients: Gradients | None = None,
    num_scored: int | None = None,
    stop_signal: Callable[[], int] = lambda: 0,
) -> QueuedStep:
    """Take one step on the mean loss over all scored tokens of all micro-batches and processes.

    The step is taken only when the loss and the norm of the gradient are finite. `stop_signal` is asked at its end, so
    that every process learns in the same step that one of them was told to stop.

    Args:
        task: Counts and scores the tokens.
        model: The task's model as it was prepared for the run.
        optimizer: The model's.
        accelerator: Of the run.
        micro_batches: This process's; each process has as many.
        max_grad_norm: Larger gradients are scaled down to it.
        gradients: The model's; None where they lie in its parameters.
        num_scored: How many micro-batches count; those after are fill-ins, whose losses and gradients are set to 0.
        stop_signal: The stop signal that this process has received, or 0.
    """
    scored = len(micro_batches) if num_scored is None else num_scored
    counts = [_count(task, batch) if index < scored else None for index, batch in enumerate(micro_batches)]
    count = round(sum_over_processes(accelerator, [float(sum(count or 0 for count in counts))])[0])
    optimizer.zero_grad()
    # DDP averages gradients over processes: times their number gives the sum.
    scale = accelerator.num_processes / max(count, 1)
    gradients = gradients or Gradients(model, accelerator)
    losses = _accumulate(task, model, gradients, accelerator, micro_batches, counts, scale)
    max_norm, adamw = max_grad_norm or math.inf, fused_adamw(optimizer, gradients, accelerator)
    if adamw is not None and count > 0:
        read = _stepped(optimizer, adamw, gradients, losses, max_norm)

        def finish() -> StepResult:
            figures = _gather(accelerator, {**read(), "stop": stop_signal()})
            return _result(figures, count, _skip_reason_of(figures, count))

        return QueuedStep(finish, stop_signal(), is_waiting=True)
    own = _own_figures(losses, gradients.clip(max_norm).item())
    result = _taken(optimizer, gradients, accelerator, _gather(accelerator, {**own, "stop": stop_signal()}), count)
    return QueuedStep(lambda: result, result.stop_signal, is_waiting=False)


def _taken(
    optimizer: StepOptimizer, gradients: Gradients, accelerator: Accelerator, figures: _Figures, count: int
) -> StepResult:
    """Step, unless the figures forbid it."""
    reason, is_scaled = _skip_reason_of(figures, count), accelerator.scaler is not None
    if reason is None:
        optimizer.step()
    else:
        gradients.discard()
        if accelerator.scaler is not None:
            accelerator.scaler.update()
            # A scale that is down to this is not what makes gradients overflow.
            is_scaled = accelerator.scaler.get_scale() > _SMALLEST_SCALE
    result = _result(figures, count, reason)
    return replace(result, is_overflow=is_scaled and reason is not None and count > 0 and math.isfinite(result.loss))


def _result(figures: _Figures, count: int, reason: str | None) -> StepResult:
    return StepResult(
        loss=_mean_loss(figures, count),
        count=count,
        grad_norm=figures.grad_norm,
        parts=figures.parts,
        skip_reason=reason,
        suspects=figures.suspects,
        stop_signal=figures.stop_signal,
    )


def _count(task: Task, batch: Batch) -> int:
    count = task.count(batch)
    if not (count >= 0 and float(count).is_integer()):
        raise UsageError(
            f"{type(task).__name__}.count gave {count}, which is no number of tokens: weights belong into the sum of "
            "the losses, and here stands how many there are"
        )
    return int(count)


def _accumulate(
    task: Task,
    model: nn.Module,
    gradients: Gradients,
    accelerator: Accelerator,
    micro_batches: Sequence[Batch],
    counts: Sequence[int | None],
    scale: float,
) -> list[Loss]:
    losses: list[Loss] = []
    for index, (batch, count) in enumerate(zip(micro_batches, counts, strict=True)):
        with gradients.micro_batch(is_last=index == len(micro_batches) - 1):
            batch = cast(Batch, send_to_device(batch, accelerator.device, non_blocking=True))
            with accelerator.autocast(), _through_forward(task, model, accelerator):
                loss = task.loss(model, batch)
            if count is None:
                loss = _without_weight(loss)
            elif loss.count != count:
                raise UsageError(
                    f"{type(task).__name__}.loss scored {loss.count} tokens where count(batch) said {count}: "
                    "they must agree, for the loss is divided by the latter"
                )
            if loss.total.dim():
                raise UsageError(
                    f"{type(task).__name__}.loss gave a total of shape {tuple(loss.total.shape)}: it has to be one "
                    "number without dimensions, the sum of the losses"
                )
            gradients.backward(loss.total * scale)
        parts = {name: (total.detach(), number) for name, (total, number) in loss.parts.items()}
        losses.append(Loss(loss.total.detach(), loss.count, parts))
    return losses


@contextmanager
def _through_forward(task: Task, model: nn.Module, accelerator: Accelerator) -> Iterator[None]:
    """Check that the loss runs the module that it is given: past it, processes would train apart without a word."""
    if accelerator.num_processes == 1:
        yield
        return
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    handle = model.register_forward_pre_hook(count)
    try:
        yield
    finally:
        handle.remove()
    if not calls:
        raise UsageError(
            f"{type(task).__name__}.loss has to call the model that it receives, which with several processes is "
            f"another module than {type(task).__name__}.model, and it did not"
        )


def _without_weight(loss: Loss) -> Loss:
    return Loss(loss.total * 0, 0, {name: (total * 0, 0) for name, (total, _) in loss.parts.items()})


@dataclass(frozen=True)
class _Figures:
    totals: list[float]
    parts: dict[str, float]
    suspects: list[tuple[int, int]]
    grad_norm: float
    stop_signal: int


def _stepped(
    optimizer: StepOptimizer,
    adamw: torch.optim.AdamW,
    gradients: Gradients,
    losses: Sequence[Loss],
    max_norm: float,
) -> Callable[[], dict[str, Any]]:
    """Step, unless a loss or the norm is not finite; what waits for `_own_figures`."""
    parts = {name: _sum_part(losses, name) for name in _part_names(losses)}
    totals, others = [loss.total for loss in losses], [total for total, _ in parts.values()]
    read = step_ahead(optimizer, adamw, gradients.parameters, totals, others, max_norm)
    part_counts = [number for _, number in parts.values()]

    def figures() -> dict[str, Any]:
        norm, totals, others = read()
        numbers = zip(others, part_counts, strict=True)
        return {"totals": totals, "parts": dict(zip(parts, numbers, strict=True)), "norm": norm}

    return figures


def _own_figures(losses: Sequence[Loss], grad_norm: float) -> dict[str, Any]:
    """What this process has to say of a step."""
    parts = {name: _sum_part(losses, name) for name in _part_names(losses)}
    return {
        "totals": torch.stack([loss.total for loss in losses]).tolist(),
        "parts": {name: (float(total), number) for name, (total, number) in parts.items()},
        "norm": grad_norm,
    }


def _part_names(losses: Sequence[Loss]) -> list[str]:
    return sorted({name for loss in losses for name in loss.parts})


def _gather(accelerator: Accelerator, own: dict[str, Any]) -> _Figures:
    everyone = gather_object([own]) if accelerator.num_processes > 1 else [own]
    parts: dict[str, float] = {}
    for name in sorted({name for one in everyone for name in one["parts"]}):
        pairs = [one["parts"][name] for one in everyone if name in one["parts"]]
        number = sum(pair[1] for pair in pairs)
        if number:
            parts[name] = sum(pair[0] for pair in pairs) / number
    return _Figures(
        totals=[total for one in everyone for total in one["totals"]],
        parts=parts,
        suspects=[
            (rank, index)
            for rank, one in enumerate(everyone)
            for index, total in enumerate(one["totals"])
            if not math.isfinite(total)
        ],
        grad_norm=max((one["norm"] for one in everyone), key=lambda norm: (not math.isfinite(norm), norm)),
        stop_signal=max(one["stop"] for one in everyone),
    )


def _sum_part(losses: Sequence[Loss], name: str) -> tuple[Tensor, int]:
    pairs = [loss.parts[name] for loss in losses if name in loss.parts]
    return torch.stack([total for total, _ in pairs]).sum(), sum(number for _, number in pairs)


def _mean_loss(figures: _Figures, count: int) -> float:
    return sum(figures.totals) / max(count, 1)


def _skip_reason_of(figures: _Figures, count: int) -> str | None:
    if count == 0:
        return "the batch holds nothing to score"
    if not math.isfinite(loss := _mean_loss(figures, count)):
        return f"the loss is {loss}"
    if not math.isfinite(figures.grad_norm):
        return f"the norm of the gradient is {figures.grad_norm}"
    return None


class BufferGuard:
    """Keeps the buffers of the last good step, for a skipped step has already put its figures into batch norm's."""

    def __init__(self, buffers: Mapping[str, Tensor]) -> None:
        self._buffers = list(buffers.values())
        self._kept = [buffer.clone() for buffer in self._buffers]
        self._versions = self._read_versions()
        self._are_written = False
        self._is_kept_before = True  # what is kept is of the step before the one that is asked about

    def are_written(self) -> bool:
        """Does the model write to any of them? (A table of constants never changes.) To be asked after each step.

        A write through `tensor.data`, or by `F.batch_norm`, leaves the version as it was: so values are compared too,
        which has to wait for a card, and is done only after the first step and those that follow `keep`.
        """
        if not self._are_written:
            is_changed = self._is_kept_before and not all(map(_are_same_bits, self._buffers, self._kept))
            self._are_written = is_changed or self._versions != self._read_versions()
            self._is_kept_before = False
        return self._are_written

    def _read_versions(self) -> list[int]:
        return [0 if buffer.is_inference() else buffer._version for buffer in self._buffers]

    def keep(self) -> None:
        """Remember the buffers after a good step."""
        for buffer, kept in zip(self._buffers, self._kept, strict=True):
            kept.copy_(buffer)
        self._is_kept_before = True

    def put_back(self) -> None:
        """Undo what happened to the buffers since `keep`."""
        for buffer, kept in zip(self._buffers, self._kept, strict=True):
            if not _are_same_bits(buffer, kept):  # a table need not be writable: expanded, or made for inference
                buffer.copy_(kept)


def _are_same_bits(one: Tensor, other: Tensor) -> bool:
    # Not by value: that does not exist for every type of eight bits, and NaN is not itself.
    bits = [own_rows(tensor).local.flatten().view(torch.uint8) for tensor in (one, other)]
    return torch.equal(*bits)
