"""May a call go round torch's dispatcher? Needs no triton."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad

_TYPES = (Tensor, torch.nn.Parameter)


def is_plain_call(*tensors: Tensor) -> bool:
    """Is this an eager call on ordinary tensors, that nobody but autograd wants to see?

    False while torch compiles, exports or traces, within a dispatch mode (fake tensors, counting, selective
    checkpoints), within vmap and other transforms of torch.func, within forward-mode derivatives, and for subclasses
    and views that the dispatcher has to resolve first. The names of torch that are not public are all here.
    """
    if torch.compiler.is_compiling() or torch._C._is_tracing():
        return False
    if torch._C._len_torch_dispatch_stack() or peek_interpreter_stack() is not None:
        return False
    if forward_ad._current_level >= 0:
        return False
    for tensor in tensors:  # noqa: SIM110 (a generator takes half a microsecond of every call)
        if type(tensor) not in _TYPES or tensor.is_neg():
            return False
    return True
