"""How a step's gradients come about: backward passes, their sum over micro-batches and processes, their norm."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from mmattn.errors import UsageError


class Gradients:
    """Gradients that lie in the parameters, as autograd, DDP and FSDP2 leave them.

    Args:
        model: The task's model as it was prepared for the run.
        accelerator: Of the run.
    """

    def __init__(self, model: nn.Module, accelerator: Accelerator) -> None:
        self._model, self._accelerator = model, accelerator

    @property
    def are_whole(self) -> bool:
        """Whether this process has all of them, as ordinary tensors."""
        return not isinstance(self._model, FSDPModule) and self._accelerator.distributed_type != DistributedType.FSDP

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Whose they are."""
        return [parameter for parameter in self._model.parameters() if parameter.requires_grad]

    def micro_batch(self, *, is_last: bool) -> AbstractContextManager[None]:
        """Around the forward and backward pass of a micro-batch; `is_last` of its step."""
        if isinstance(self._model, DistributedDataParallel) and is_last:
            return _summed(self._model)
        # Gradients that wait to be summed over processes are whole ones, which sharding is there to avoid.
        if is_last or isinstance(self._model, FSDPModule):
            return nullcontext()
        return self._accelerator.no_sync(self._model)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a loss, which is averaged over processes."""
        self._accelerator.backward(loss)

    def clip(self, max_norm: float) -> Tensor:
        """Scale gradients of a larger norm down to `max_norm`; the norm before that, a scalar."""
        parameters = self.parameters
        if isinstance(self._model, FSDPModule):  # Accelerate knows only those that it has sharded itself
            norm = nn.utils.clip_grad_norm_(parameters, max_norm)
            return norm.full_tensor() if isinstance(norm, DTensor) else norm
        if self._accelerator.distributed_type == DistributedType.FSDP:
            return torch.as_tensor(self._accelerator.clip_grad_norm_(parameters, max_norm))
        self._accelerator.unscale_gradients()
        return clip_whole_gradients(parameters, max_norm)

    def discard(self) -> None:
        """Leave the step out: called in place of the optimiser's. Here the next step's `zero_grad` is enough."""


@contextmanager
def _summed(model: DistributedDataParallel) -> Iterator[None]:
    """Around the micro-batch in which DDP sums gradients over processes: it waits for all parameters, and where one
    takes no part the sum of others is left out too, which DDP would say in the next forward pass, if there is one.

    Raises:
        UsageError: so it is.
    """
    yield
    try:
        model._check_reducer_finalized()
    except RuntimeError as error:
        trained = [(name, each) for name, each in model.module.named_parameters() if each.requires_grad]
        unused = [name for name, parameter in trained if parameter.grad is None]
        raise UsageError(
            f"{', '.join(unused[:5]) or 'a parameter'} took no part in the last micro-batch of a step, and DDP does "
            "not sum gradients over processes then: freeze what is not used, multiply by 0 what does not count, or "
            "use training.sharding=fsdp2"
        ) from error


def clip_whole_gradients(parameters: Sequence[nn.Parameter], max_norm: float) -> Tensor:
    """As `torch.nn.utils.clip_grad_norm_`, finite gradients bit for bit, but those that are within the bound are left
    alone, where that multiplies them all by 1.

    Returns:
        The norm before clipping.
    """
    norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    if not norm + 1e-6 <= max_norm:  # torch's own allowance
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm
