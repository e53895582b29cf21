"""What kind of call is this: may it go round torch's dispatcher? Needs no triton."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C import _TorchDispatchModeKey as TorchDispatchModeKey
from torch._C._functorch import TransformType, get_interpreter_stack, is_legacy_batchedtensor, peek_interpreter_stack
from torch.autograd import forward_ad

_TYPES = (Tensor, torch.nn.Parameter)


def is_plain_call(*tensors: Tensor | None) -> bool:
    """Is this an eager call on ordinary tensors, that nobody but autograd wants to see?

    False within a dispatch mode too (fake tensors, counting, selective checkpoints). None stands for no tensor. The
    names of torch that are not public are all here.
    """
    # In this order: torch.compile is asked first, for it cannot trace the other.
    return is_eager_call(*tensors) and not torch._C._len_torch_dispatch_stack()


def is_eager_call(*tensors: Tensor | None) -> bool:
    """Is this a call on ordinary tensors that runs as it is written?

    False while torch compiles, exports or traces (`make_fx` too), within vmap and other transforms of torch.func and
    forward-mode derivatives, and for subclasses, views that the dispatcher has to resolve first, and several gradients
    at once (`is_grads_batched`).
    """
    if torch.compiler.is_compiling() or torch._C._is_tracing() or _has_mode(TorchDispatchModeKey.PROXY):
        return False
    if peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
        return False
    for tensor in tensors:
        if tensor is None:
            continue
        if type(tensor) not in _TYPES or tensor.is_neg() or is_legacy_batchedtensor(tensor):
            return False
    return True


def is_compiled_call(*tensors: Tensor) -> bool:
    """Does torch compile or export this call, on ordinary tensors and without transforms of torch.func (which custom
    operations have none of there) and forward-mode derivatives?"""
    if not torch.compiler.is_compiling() or forward_ad._current_level >= 0 or _is_transformed():
        return False
    return all(type(tensor) in _TYPES for tensor in tensors)


@torch.compiler.assume_constant_result
def _is_transformed() -> bool:
    # While torch traces, its transforms are on the stack; they are a guard of what it compiles.
    return peek_interpreter_stack() is not None


def makes_fake_tensors() -> bool:
    """Is this within a FakeTensorMode? What is made there has no values, and must not be kept for calls outside."""
    return not torch.compiler.is_compiling() and _has_mode(TorchDispatchModeKey.FAKE)


def _has_mode(key: TorchDispatchModeKey) -> bool:
    return torch._C._len_torch_dispatch_stack() > 0 and torch._C._get_dispatch_mode(key) is not None


def is_forward_mode() -> bool:
    """Is this within forward-mode derivatives? Always false in what torch compiles."""
    return not torch.compiler.is_compiling() and forward_ad._current_level >= 0


def wants_any_derivative() -> bool:
    """Is this within derivatives that a kernel with a backward pass alone has not: forward-mode ones, and those of
    gradients in torch.func? (Those of autograd nobody knows beforehand.)"""
    if torch.compiler.is_compiling():
        return False
    if forward_ad._current_level >= 0:
        return True
    if peek_interpreter_stack() is None:
        return False
    return sum(each.key() == TransformType.Grad for each in get_interpreter_stack() or ()) > 1
