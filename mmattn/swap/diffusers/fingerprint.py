"""Whether a tensor, or what a module computes, is still the same: by identity and version, never by address alone.

An address says little: freed memory is given to other tensors, and a tensor can be changed where it lies. So storages
are told apart by their C++ object, kept from being reused by a weak reference that does not keep the data, and
changes by the tensor's version counter, and by counting the steps of optimizers, whose fused kernels pass it by.
What no counter sees is a write through `tensor.data` between two calls.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.module import _has_any_global_hook
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle


class Fingerprint(NamedTuple):
    """What something is now.

    Attributes:
        key: equal for two fingerprints only if nothing has changed in between.
        held: must be kept as long as the key is, so that no other object gets an identity of it.
    """

    key: Hashable
    held: tuple[Any, ...]


def of_tensor(tensor: Tensor) -> Fingerprint | None:
    """Of a tensor's contents; None where torch keeps no version (inference mode)."""
    if tensor.is_inference():
        return None
    storage = StorageWeakRef(tensor.untyped_storage())
    place = (storage.cdata, tensor.storage_offset(), tensor.shape, tensor.stride())
    return Fingerprint((*place, tensor.dtype, tensor.device, tensor._version), (storage,))


def of_modules(*modules: nn.Module | None) -> Fingerprint | None:
    """Of what some modules compute: their tensors, and the plain values in their attributes (an adapter's scale, which
    adapters are active or merged). None when a hook or a replaced `forward` may make them compute something else, or
    dropout is on. What other objects in attributes hold is not looked at."""
    if _has_any_global_hook():
        return None
    _OPTIMIZERS.watch()
    keys: list[Hashable] = [_OPTIMIZERS.steps]
    held: list[Any] = []
    for module in modules:
        for part in module.modules() if module is not None else ():
            if part._forward_hooks or part._forward_pre_hooks or not _is_followed(vars(part).get("forward")):
                return None
            if isinstance(part, _DropoutNd) and part.training and part.p > 0:
                return None
            keys.append((id(part), part.training, None if type(part) is nn.Linear else _plain_values(part)))
            held.append(part)
            for tensor in _tensors_of(part):
                fingerprint = of_tensor(tensor)
                if fingerprint is None:
                    return None
                keys.append((id(tensor), fingerprint.key))
                held.extend((tensor, *fingerprint.held))
    return Fingerprint(tuple(keys), tuple(held))


class WatchOptimizers:
    """Counts the steps of all optimizers, while some swap is in place that keeps projected texts."""

    def do(self) -> None:
        """Begin."""
        _OPTIMIZERS.watch()

    def undo(self, *, force: bool = False) -> str | None:
        """End, until anybody else asks for a fingerprint."""
        _OPTIMIZERS.rest()
        return None

    def problem(self) -> str | None:
        """Nobody else knows the handle."""
        return None


class _Optimizers:
    """One hook for the process, however many swaps there are or have been whose handles are gone."""

    def __init__(self) -> None:
        self.steps = 0
        self._handle: RemovableHandle | None = None
        self._lock = threading.Lock()

    def watch(self) -> None:
        """Count from now on."""
        with self._lock:
            if self._handle is None:
                self._handle = register_optimizer_step_post_hook(self._count)

    def rest(self) -> None:
        """Count no more. Whatever was kept until now, steps may be missed: no fingerprint from before is good."""
        with self._lock:
            if self._handle is not None:
                self._handle.remove()
            self._handle = None
            self.steps += 1

    def _count(self, *event: Any) -> None:
        self.steps += 1


_OPTIMIZERS = _Optimizers()


def of_autocast(device: torch.device) -> Hashable:
    """Of the precision that autocast asks for here: None without it."""
    is_on = torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if is_on else None


def _is_followed(forward: Any) -> bool:
    """Whether a module's own `forward` attribute (None without one) computes what its class would."""
    return forward is None or getattr(forward, "is_transparent", False)


def _tensors_of(module: nn.Module) -> Iterator[Tensor]:
    """A module's own tensors, those in plain attributes too."""
    yield from _tensors_in(module._parameters)
    yield from _tensors_in(module._buffers)
    if type(module) is not nn.Linear:
        for name, value in vars(module).items():
            if name not in ("_parameters", "_buffers", "_modules"):
                yield from _tensors_in(value)


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors_in(item)


def _plain_values(module: nn.Module) -> str:
    return repr([(name, value) for name, value in vars(module).items() if _is_plain(value)])


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_is_plain(item) for item in value.values())
    if isinstance(value, (list, tuple, set, frozenset)):
        return all(_is_plain(item) for item in value)
    return isinstance(value, (bool, int, float, str, type(None)))
