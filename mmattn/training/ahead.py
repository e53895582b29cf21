"""A step of the optimiser that is queued on a card before anybody has seen its loss and norm.

Whether it may be taken, and by how much its gradients are scaled down, is decided on the card. So that has work to do
while this process learns the figures and writes them down; to look first would leave it idle in between. The loop looks
at a step when the next one is queued, where nothing has to be known before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from mmattn.training.gradients import Gradients
from mmattn.training.optim import StepOptimizer

_AHEAD = ("cuda",)  # elsewhere there is nothing to wait for


def fused_adamw(optimizer: StepOptimizer, gradients: Gradients, accelerator: Accelerator) -> torch.optim.AdamW | None:
    """The optimiser that can decide by itself; None where a step has to be looked at before it is taken: with several
    processes, with a loss scale, in pieces, on a CPU."""
    own = getattr(optimizer, "optimizer", optimizer)
    if accelerator.device.type not in _AHEAD or accelerator.num_processes > 1 or accelerator.scaler is not None:
        return None
    if type(gradients) is not Gradients or not gradients.are_whole or type(own) is not torch.optim.AdamW:
        return None
    return own if all(group["fused"] for group in own.param_groups) else None


def step_ahead(
    optimizer: StepOptimizer,
    adamw: torch.optim.AdamW,
    parameters: Sequence[nn.Parameter],
    losses: Sequence[Tensor],
    others: Sequence[Tensor],
    max_norm: float,
) -> Callable[[], tuple[float, list[float], list[float]]]:
    """Step, unless a loss or the norm of the gradients is not finite.

    Args:
        optimizer: what is asked to step.
        adamw: the same, or what is in it.
        parameters: whose gradients are wanted.
        losses: scalars.
        others: scalars that are wanted with them.
        max_norm: gradients of a larger norm are scaled down to it by the optimiser, as `clip_grad_norm_` does but for
            rounding.

    Returns:
        What waits for figures, and for nothing that is queued after them: the norm of the gradients before that, the
        losses, the others.
    """
    norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    device = losses[0].device
    told = torch.stack([figure.detach().to(device, torch.float64) for figure in (norm, *losses, *others)])
    is_bad = (~told[: 1 + len(losses)].isfinite().all()).float()
    # torch's own allowance.
    scale = None if math.isinf(max_norm) else ((norm + 1e-6) / max_norm).clamp(min=1.0).float()
    read = _queue_copy(told)
    with _decided(adamw, is_bad, scale):
        optimizer.step()
    num_losses = len(losses)

    def figures() -> tuple[float, list[float], list[float]]:
        found = read()
        return found[0], found[1 : 1 + num_losses], found[1 + num_losses :]

    return figures


@contextmanager
def _decided(adamw: torch.optim.AdamW, is_bad: Tensor, scale: Tensor | None) -> Iterator[None]:
    """Inside, a fused step does nothing where `is_bad` is 1, and divides gradients by `scale`: as torch's own scaler of
    losses has it."""
    told = cast(Any, adamw)
    told.found_inf, told.grad_scale = is_bad, scale
    try:
        yield
    finally:
        del told.found_inf, told.grad_scale


def _queue_copy(told: Tensor) -> Any:
    """A function that waits for the numbers, and not for what is queued after them."""
    if told.device.type == "cpu":
        return told.tolist
    host = torch.empty_like(told, device="cpu", pin_memory=True)
    host.copy_(told, non_blocking=True)
    done = torch.cuda.Event()
    done.record(torch.cuda.current_stream(told.device))  # which may be another card than the current one

    def read() -> list[float]:
        done.synchronize()
        return host.tolist()

    return read
