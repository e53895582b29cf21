"""How operations are differentiated: one rule for both roads, through torch's dispatcher and round it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mmattn.kernels.plain import is_plain_call

Gradients = tuple[Tensor, Tensor, Tensor]


def empty_gradients(query: Tensor, key: Tensor, value: Tensor) -> Gradients:
    """Room for the gradients of each, in the order of axes that it has in memory."""
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def differentiable(
    operation: Any,
    backward_operation: Any,
    attend: Callable[..., tuple[Tensor, Tensor]],
    gradients_of: Callable[..., Gradients],
    num_options: int,
) -> Callable[..., Tensor]:
    """Give an operation its gradients, and both operations what fake tensors need of them.

    Args:
        operation: of `torch.library.custom_op`, (query, key, value, *places, *options) -> (output, log-sum-exp), where
            places are tensors or None and have no gradients. Gradients flow through the output only.
        backward_operation: (grad_output, query, key, value, output, log-sum-exp, *places, *options) -> gradients of
            query, key and value; it has none itself.
        attend: what the operation runs.
        gradients_of: what the backward operation runs.
        num_options: how many options there are.

    Returns:
        A function of the operation's arguments, with gradients, that gives the output and goes round the dispatcher;
        for calls that are plain (`is_plain_call`).
    """

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        query, key, value, *rest = inputs
        ctx.save_for_backward(query, key, value, *output, *rest[:-num_options])
        ctx.options = rest[-num_options:]

    def run_backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        run = gradients_of if is_plain_backward(grad_output, *saved) else backward_operation
        num_others = len(saved) - 5 + num_options
        return (*run(grad_output, *saved, *ctx.options), *(None,) * num_others)

    @backward_operation.register_fake
    def _(grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Gradients:
        return empty_gradients(query, key, value)

    return differentiated_by(operation, attend, save, run_backward)


def is_plain_backward(grad_output: Tensor, *saved: Tensor | None) -> bool:
    """May a backward pass go round the dispatcher? Not where gradients of gradients are wanted: the operation says that
    there are none."""
    return not torch.is_grad_enabled() and is_plain_call(grad_output, *saved)


def differentiated_by(
    operation: Any,
    run: Callable[..., tuple[Tensor, ...]],
    save: Callable[[Any, tuple[Any, ...], Any], None],
    run_backward: Callable[[Any, Tensor], tuple[Tensor | None, ...]],
) -> Callable[..., Tensor]:
    """Give an operation its gradients.

    Args:
        operation: of `torch.library.custom_op`; gradients flow through its first result only.
        run: what it runs.
        save: (context, inputs, results) keeps in the context what the backward pass needs.
        run_backward: (context, gradient of the first result) -> a gradient or None for each input.

    Returns:
        A function of the operation's arguments, with gradients, that gives its first result and goes round the
        dispatcher; for calls that are plain (`is_plain_call`).
    """

    def save_operation(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        save(ctx, inputs, output)
        ctx.mark_non_differentiable(*output[1:])

    class _Call(torch.autograd.Function):
        """The rule for calls that go round the dispatcher."""

        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
            results = run(*inputs)
            save(ctx, inputs, results)
            return results[0]

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
            return run_backward(ctx, grad)

    operation.register_autograd(lambda ctx, grad, *_: run_backward(ctx, grad), setup_context=save_operation)
    # `_Call.apply` without its questions about torch.func, which `is_plain_call` has answered: half of what it costs.
    return super(torch.autograd.Function, _Call).apply  # pyright: ignore[reportAttributeAccessIssue]
