"""Derivatives that fused kernels do not have: who asks for them is told in one line which backend has."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mmattn.errors import BackendError

_EAGER_HAS = 'backend="eager" has them (mmattn.use_backend, or the argument of a call or block)'


class _Last(torch.autograd.Function):
    """A gradient that cannot be differentiated."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        raise BackendError(f"attention: torch's fused kernels have no derivatives of their gradients: {_EAGER_HAS}")


def _mark(grad_inputs: tuple[Tensor | None, ...], grad_outputs: tuple[Tensor, ...]) -> tuple[Any, ...] | None:
    if not torch.is_grad_enabled():  # nobody differentiates what this backward computes
        return None
    return tuple(None if gradient is None else _Last.apply(gradient) for gradient in grad_inputs)


def refuse_second(output: Tensor) -> None:
    """Name the backend to whoever differentiates the gradients of a fused kernel's output once more."""
    node = output.grad_fn
    # With dropout, or a mask that wants a gradient, torch computes in plain products, which have every derivative.
    if node is not None and node.name().startswith("ScaledDotProduct"):
        node.register_hook(_mark)


@contextlib.contextmanager
def forward_mode_refused() -> Iterator[None]:
    """Around a fused kernel's call within forward-mode derivatives: names the backend where it has none.

    Raises:
        BackendError: it has none.
    """
    try:
        yield
    except NotImplementedError as error:
        raise BackendError(
            f"attention: torch's fused kernels have no forward-mode derivatives (torch.func.jvp, jacfwd): {_EAGER_HAS}"
        ) from error
