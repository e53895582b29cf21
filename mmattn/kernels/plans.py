"""Launches remembered from a first call, so that a later one of equal sizes costs the processor little.

Triton binds, specialises and looks up a kernel anew in every launch, which takes tens of microseconds with so many
arguments. All of that depends on what a call's signature says: sizes, strides, dtype, device, and which addresses are
multiples of 16 bytes. A plan keeps the compiled kernels of a signature, and only puts in the addresses of the tensors.
"""

from __future__ import annotations

import functools
import itertools
import threading
import warnings
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from packaging.version import Version
from torch import Tensor

from mmattn.kernels.launch import Launch, on_device

# A compiled kernel is launched by `compiled[grid](*arguments)`, addresses as integers, all of them in the kernel's
# order, constants included: tried with these versions (tests/kernels/test_plans.py), and the only place that does so.
TRIED = ("3.6", "3.10")
MOST_PLANS = 512
# Triton compiles another kernel for pointers that are no multiple of it.
_ALIGNMENT = 16
_POINTER = "_ptr"


@dataclass(frozen=True, slots=True)
class _Prepared:
    """A compiled kernel; which of the call's addresses it takes, in order; its other arguments; and the places among
    these of numbers that are not the plan's but the call's, with which of the call's it is."""

    launch: Callable[..., None]
    sources: tuple[int, ...]
    rest: tuple[Any, ...]
    varying: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """The launches of one signature, and the buffers (shape, dtype) that they hand on among themselves."""

    prepared: tuple[_Prepared, ...]
    buffers: tuple[tuple[torch.Size, torch.dtype], ...]

    def run(self, device: torch.device, addresses: tuple[int, ...], numbers: tuple[int, ...] = ()) -> None:
        """Launch on `device`'s current stream, for tensors at `addresses` (0 where there is none), which the caller
        holds meanwhile, and for the `numbers` that the plan was made without."""
        # Their addresses are multiples of 64 in every allocator of torch's.
        buffers = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in self.buffers]
        if buffers:
            addresses = (*addresses, *(buffer.data_ptr() for buffer in buffers))
        with on_device(device):
            for each in self.prepared:
                rest = each.rest
                if each.varying:
                    own = list(rest)
                    for place, number in each.varying:
                        own[place] = numbers[number]
                    rest = own
                each.launch(*[addresses[source] for source in each.sources], *rest)


@dataclass(slots=True)
class Plans:
    """Plans by signature, the oldest forgotten beyond `MOST_PLANS`. Threads may share it.

    Attributes:
        names: of a call's tensors in their order, those of the kernels' pointer arguments (without "_ptr"). A pointer
            argument with another name is one of these by identity, or a buffer between launches.
        varying: numbers among the kernels' arguments, of `SIZES` or the like, that differ between calls of one plan.
        plans: what is remembered.
    """

    names: tuple[str, ...]
    varying: tuple[str, ...] = ()
    plans: dict[Hashable, Plan] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def launch(
        self,
        sizes: Hashable,
        tensors: tuple[Tensor | None, ...],
        make: Callable[[], tuple[Launch, ...]],
        numbers: tuple[int, ...] = (),
    ) -> None:
        """Launch what a call takes, by the plan of calls like it, or else as `make` makes it and remembered.

        Args:
            sizes: all that the call's launches depend on, but where its tensors lie and what varies.
            tensors: the call's, on one device, the first one there; None is not there.
            make: gives the launches, made for `tensors`.
            numbers: the call's, of `varying`.
        """
        first = tensors[0]
        assert first is not None
        addresses = tuple([0 if tensor is None else tensor.data_ptr() for tensor in tensors])
        signature = (sizes, alignment(addresses))
        plan = self.plans.get(signature)
        if plan is not None:
            plan.run(first.device, addresses, numbers)
            return
        launches = make()
        compiled = [launch.run(first.device) for launch in launches]
        plan = plan_of(launches, compiled, dict(zip(self.names, tensors, strict=True)), self.varying)
        if plan is None:
            return
        with self._lock:
            while len(self.plans) >= MOST_PLANS:
                del self.plans[next(iter(self.plans))]
            self.plans[signature] = plan


def alignment(addresses: tuple[int, ...]) -> Hashable:
    """Of addresses all that a compiled kernel depends on."""
    together = 0
    for address in addresses:
        together |= address
    return together % _ALIGNMENT == 0 or tuple(address % _ALIGNMENT == 0 for address in addresses)


def plan_of(
    launches: tuple[Launch, ...],
    compiled: list[Any],
    tensors: Mapping[str, Tensor | None],
    varying: tuple[str, ...] = (),
) -> Plan | None:
    """The plan of launches that were run, from the compiled kernels that running them gave back.

    None where there is nothing to plan with: on the interpreter, and with a version of Triton that was not tried
    (which is said once).
    """
    if any(kernel is None for kernel in compiled) or not _is_tried():
        return None
    places = {name: place for place, name in enumerate(tensors)}
    buffers: list[Tensor] = []
    prepared = []
    for launch, kernel in zip(launches, compiled, strict=True):
        names = launch.kernel.arg_names
        pointers = list(itertools.takewhile(lambda name: name.endswith(_POINTER), names))
        sources = [_source(name, launch.arguments[name], tensors, places, buffers) for name in pointers]
        rest = tuple(launch.arguments[name] for name in names[len(pointers) :])
        assert not any(isinstance(value, Tensor) for value in rest)  # pointers come first in every kernel
        own = names[len(pointers) :]
        numbers = tuple((own.index(name), place) for place, name in enumerate(varying) if name in own)
        prepared.append(_Prepared(kernel[(launch.programs, 1, 1)], tuple(sources), rest, numbers))
    return Plan(tuple(prepared), tuple((buffer.shape, buffer.dtype) for buffer in buffers))


def _source(
    name: str, tensor: Tensor, tensors: Mapping[str, Tensor | None], places: dict[str, int], buffers: list[Tensor]
) -> int:
    """Where an argument's address stands in those of the call, which the buffers' follow."""
    own = name.removesuffix(_POINTER)
    if tensors.get(own) is not None:
        return places[own]
    for other, candidate in tensors.items():
        if candidate is tensor:
            return places[other]
    for place, buffer in enumerate(buffers):
        if buffer is tensor:
            return len(places) + place
    buffers.append(tensor)
    return len(places) + len(buffers) - 1


@functools.cache
def _is_tried() -> bool:
    oldest, beyond = map(Version, TRIED)
    if oldest <= Version(triton.__version__) < beyond:
        return True
    warnings.warn(
        f"mmattn's kernels were tried with triton {oldest} up to {beyond} (not included), this is "
        f"{triton.__version__}: they are launched the ordinary way, which costs the processor more",
        stacklevel=2,
    )
    return False
