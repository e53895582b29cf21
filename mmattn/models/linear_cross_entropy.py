"""The vocabulary product and its cross-entropy in one, a chunk of rows at a time: never all logits at once.

N scored positions, C channels, V tokens. A chunk's gradients are made while its probabilities are at hand, so that the
backward pass only scales them, and nothing is computed twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmattn.errors import UsageError

# Of one chunk's logits: at 58,101 words 144 rows in float32. On a CPU products of 128 rows run at 95 % of the speed of
# those of 256, of 64 rows at 60 %. On a card each chunk also reads and writes the weight's gradient once, which fewer
# than some thousand rows would not hide.
CHUNK_BYTES = {"cpu": 32 * 2**20}
_CHUNK_BYTES_ELSEWHERE = 512 * 2**20


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    label_smoothing: float = 0.0,
    fixed_token: int | None = None,
) -> Tensor:
    """Sum over the rows of the cross-entropy of `hidden @ weight.T + bias` with the targets, a scalar.

    The same number as `torch.nn.functional.cross_entropy(..., reduction="sum")` of those logits, under autocast too:
    the products then run in its dtype, the rest in float32. Memory beyond the inputs is one chunk of logits and, where
    they are wanted, the gradients.

    Args:
        hidden: `[N, C]`.
        weight: `[V, C]`.
        bias: `[V]`, or None.
        targets: int64 `[N]`, each at least 0 and below V.
        label_smoothing: at least 0 and below 1, spread evenly over all V tokens.
        fixed_token: a token whose row of `weight` gets no gradient.

    Raises:
        UsageError: in a second backward pass through one result.
    """
    device = hidden.device.type
    is_autocast = device != "meta" and torch.is_autocast_enabled(device) and hidden.dtype is not torch.float64
    dtype = torch.get_autocast_dtype(device) if is_autocast else hidden.dtype
    # In a Function's forward no gradients are recorded, whatever the caller does: ask here.
    wants = tuple(torch.is_grad_enabled() and t is not None and t.requires_grad for t in (hidden, weight, bias))
    return cast(
        Tensor, _LinearCrossEntropy.apply(hidden, weight, bias, targets, label_smoothing, fixed_token, dtype, wants)
    )


def row_chunks(num_rows: int, vocab_size: int, device: str, element_size: int = 4) -> Iterator[slice]:
    """Slices of rows whose logits take as much memory as pays on a type of device, or of one row each."""
    step = max(1, CHUNK_BYTES.get(device, _CHUNK_BYTES_ELSEWHERE) // (vocab_size * element_size))
    return (slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step))


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        label_smoothing: float,
        fixed_token: int | None,
        dtype: torch.dtype,
        wants: tuple[bool, bool, bool],
    ) -> Tensor:
        accumulate = torch.promote_types(dtype, torch.float32)
        grads = [
            torch.zeros_like(tensor, dtype=accumulate) if is_wanted and tensor is not None else None
            for tensor, is_wanted in zip((hidden, weight, bias), wants, strict=True)
        ]
        low_weight = weight.to(dtype)
        low_bias = None if bias is None else bias.to(dtype)
        total = torch.zeros((), dtype=accumulate, device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            buffer: Tensor | None = None  # one for all chunks: fresh memory costs a CPU as much as a pass over it
            for rows in row_chunks(len(hidden), len(weight), hidden.device.type, accumulate.itemsize):
                low_hidden = hidden[rows].to(dtype)
                product = _product(low_hidden, low_weight, low_bias, buffer)
                buffer = product if buffer is None else buffer
                logits = product.to(accumulate)
                # Not `+=`: compiled by torch 2.11, a Function that returns the result of an operation in place gets no
                # gradient (pytorch issue 180642).
                total = total + _loss_to_gradient_(logits, targets[rows], label_smoothing, makes_gradient=any(wants))
                _add_gradients(grads, rows, logits, low_hidden, low_weight)
                del logits, product  # before the next chunk's are made
        if grads[1] is not None and fixed_token is not None:
            grads[1][fixed_token] = 0
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        # Those of weights are no activations, and should not be counted or moved as such by hooks on saved tensors.
        ctx.save_for_backward(grads[0])
        ctx.weight_grads = grads[1:]
        return total

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        (hidden_grad,), weight_grads = ctx.saved_tensors, ctx.weight_grads
        if weight_grads is None:
            raise UsageError(
                "linear_cross_entropy: a second backward pass; the first gave away the gradients of the weights, to "
                "spare a copy of their size: run the forward pass again in place of retain_graph=True"
            )
        if any(grad is not None for grad in weight_grads):
            ctx.weight_grads = None
        grads = [
            None if hidden_grad is None else hidden_grad * grad_outputs[0],
            *(None if grad is None else grad.mul_(grad_outputs[0]) for grad in weight_grads),
        ]
        cast_grads = [None if g is None else g.to(dtype) for g, dtype in zip(grads, ctx.dtypes, strict=True)]
        return (*cast_grads, None, None, None, None, None)


def _product(hidden: Tensor, weight: Tensor, bias: Tensor | None, buffer: Tensor | None) -> Tensor:
    """Logits `[n, V]` of a chunk, on a CPU in the memory of the first chunk's, of which no other has more rows."""
    if hidden.device.type != "cpu" or hidden.dtype not in (torch.float32, torch.float64):
        return F.linear(hidden, weight, bias)
    # Laid out by tokens: with the larger matrix on the left the product is 1.6 times as fast (float32, one core of a
    # 2-core AMD machine), and those of the gradients are as fast as ever. Compiled code plans its own memory, and torch
    # traces no product into a part of another's.
    if buffer is None or torch.compiler.is_compiling():
        logits = (weight @ hidden.T).T
    else:
        flat = buffer.T.reshape(-1)[: len(weight) * len(hidden)]
        logits = torch.mm(weight, hidden.T, out=flat.view(len(weight), len(hidden))).T
    return logits if bias is None else logits.add_(bias)


def _loss_to_gradient_(logits: Tensor, targets: Tensor, label_smoothing: float, *, makes_gradient: bool) -> Tensor:
    """The loss of a chunk `[n, V]`, whose logits become the gradient of the loss in place, where it is wanted."""
    vocab_size = logits.shape[1]
    logits -= logits.amax(dim=1, keepdim=True)
    wanted = logits.gather(1, targets[:, None])
    if label_smoothing:
        wanted = (1 - label_smoothing) * wanted + label_smoothing * logits.mean(dim=1, keepdim=True)
    exps = logits.exp_()
    sums = exps.sum(dim=1, keepdim=True)
    loss = (sums.log() - wanted).sum()
    if makes_gradient:
        exps /= sums
        if label_smoothing:
            exps -= label_smoothing / vocab_size
        exps.scatter_add_(1, targets[:, None], exps.new_full((len(exps), 1), label_smoothing - 1))
    return loss


def _add_gradients(
    grads: list[Tensor | None], rows: slice, gradient: Tensor, low_hidden: Tensor, low_weight: Tensor
) -> None:
    """Add a chunk's part: `gradient [n, V]` is that of its logits."""
    hidden_grad, weight_grad, bias_grad = grads
    # Probabilities of rare tokens would vanish in float16, which no loss scale has lifted yet: its products in float32.
    dtype = torch.float32 if low_hidden.dtype is torch.float16 else low_hidden.dtype
    low_gradient = gradient.to(dtype)
    if hidden_grad is not None:
        hidden_grad[rows] = low_gradient @ low_weight.to(dtype)
    if weight_grad is not None:
        if weight_grad.dtype is dtype:
            weight_grad.addmm_(low_gradient.T, low_hidden.to(dtype))
        else:
            weight_grad += low_gradient.T @ low_hidden
    if bias_grad is not None:
        bias_grad += gradient.sum(dim=0)
