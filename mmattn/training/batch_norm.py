"""Batch norm over the examples of all processes, so that their number changes rounding only.

torch's `SyncBatchNorm` does the same for GPUs, but takes no tensors on a CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


@contextmanager
def shared_batch_norm(model: nn.Module, num_processes: int) -> Iterator[None]:
    """Inside, the batch norms of `model` (and of copies made of it) share their statistics while they train.

    Every process has to run them equally often. The statistics are those of a micro-batch, as without processes.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)] if num_processes > 1 else []
    kinds = [type(norm) for norm in norms]
    for norm, kind in zip(norms, kinds, strict=True):
        if not isinstance(norm, nn.SyncBatchNorm):
            norm.__class__ = type(kind.__name__, (_SharedStatistics, kind), {})
    try:
        yield
    finally:
        for norm, kind in zip(norms, kinds, strict=True):
            norm.__class__ = kind


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        total = tensor.clone()
        dist.all_reduce(total)
        # A tensor of its own: compiled by torch 2.11, a Function that returns what an operation in place gives back
        # gets no gradient (pytorch issue 180642).
        return total.detach()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        total = grad_outputs[0].clone()  # every process's loss depends on every process's part
        dist.all_reduce(total)
        return total


def _over_processes(tensor: Tensor) -> Tensor:
    return cast(Tensor, _Sum.apply(tensor))


class _SharedStatistics(_BatchNorm):
    def forward(self, input: Tensor) -> Tensor:
        if not self.training and self.running_mean is not None:
            return super().forward(input)
        self._check_input_dim(input)
        values = input.float() if input.dtype in (torch.float16, torch.bfloat16) else input
        places = [0, *range(2, values.dim())]
        shape = [1, -1] + [1] * (values.dim() - 2)
        number = values.new_tensor([values.numel() / values.shape[1]])
        summed = _over_processes(torch.cat([values.sum(places), number]))
        mean, number = summed[:-1] / summed[-1], summed[-1].detach()
        centred = values - mean.view(shape)
        variance = _over_processes(centred.square().sum(places)) / number
        self._update(mean.detach(), variance.detach() * number / (number - 1))
        result = centred * torch.rsqrt(variance + self.eps).view(shape)
        if self.affine:
            result = result * self.weight.view(shape) + self.bias.view(shape)
        return result.to(input.dtype)

    @torch.no_grad()
    def _update(self, mean: Tensor, variance: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_(variance.to(self.running_var.dtype), share)
