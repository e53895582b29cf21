"""The handle of a swap: what was replaced, whether it still is, whether it computes the same, and the way back."""

from __future__ import annotations

import contextlib
import functools
import threading
import weakref
from collections.abc import Iterator
from typing import Any

from torch import nn

from mmattn.errors import RunError, UsageError
from mmattn.swap.layers import Layer, Plan, Step, take
from mmattn.swap.report import SwapReport
from mmattn.swap.verify import Verification, reusing_hook, run_model, verify_swap

_LOCK = threading.RLock()  # swaps change registries of the whole process


class Swap:
    """What `mmattn.swap_attention` returns; also a context manager that restores at its end.

    The handle holds the model. Dropping it leaves the swap in place; a later `swap_attention` on the same target takes
    over and restores to stock. A copy of a swapped model, deep or pickled, is swapped too, and belongs to no handle;
    where attention goes through diffusers' dispatcher (Flux, Wan, ...) the copy is stock.

    Attributes:
        gate: the callback to pass to the pipeline as `callback_on_step_end` when `gate=` was given, else None.
    """

    def __init__(
        self, target: Any, parts: dict[str, nn.Module], plan: Plan, versions: dict[str, str], gate: Any
    ) -> None:
        self.gate = gate
        self._target = type(target).__name__
        self._parts = parts
        self._plan = plan
        self._versions = versions
        self._is_restored = True
        self._left: list[Step] = []  # what `restore` has left as it was

    def install(self) -> None:
        """Do it: all or nothing.

        Raises:
            UsageError: when a layer is in another swap's hands.
        """
        with _LOCK:
            taken = {id(module): swap for swap in _ACTIVE for module in swap.modules()}
            for layer in self._plan.layers:
                if layer.is_swapped and id(layer.module) in taken:
                    raise UsageError(
                        f"swap_attention: {layer.full_name} is already swapped; call restore() of that swap first "
                        "(different roles or parts may be swapped one after the other)"
                    )
            take(self._plan.steps())
            self._is_restored = False
            _ACTIVE.add(self)

    @property
    def layers(self) -> list[Layer]:
        """Every attention layer found, swapped or not."""
        return self._plan.layers

    def modules(self) -> list[nn.Module]:
        """The modules whose attention is ours now."""
        return [layer.module for layer in self._plan.layers if layer.is_swapped]

    def report(self) -> SwapReport:
        """Layer by layer: name, role, what was there, the backend, what is kept, or why it was left alone."""
        return SwapReport(self._target, self._plan.layers, self._plan.notes, self._versions)

    def check(self) -> list[str]:
        """Whether everything is still in place: a line for each thing that is not, none when all is well. Attention
        slicing, `set_attn_processor` and IP-Adapter loading replace processors without asking, AnimateDiff's
        `enable_free_noise` replaces whole modules."""
        if self._is_restored:
            return ["this swap was restored"]
        problems = []
        for step in self._plan.shared:
            problem = step.problem()
            problems += [] if problem is None else [problem]
        there = {id(module) for model in self._parts.values() for module in model.modules()}
        for layer in self._plan.layers:
            if layer.is_swapped and layer.step is not None:
                problem = layer.step.problem()
                if id(layer.module) not in there:
                    problem = "its module is no longer in the model (enable_free_noise puts others in their place)"
                problems += [] if problem is None else [f"{layer.full_name}: {problem}"]
        return problems

    def verify(self, **inputs: Any) -> Verification:
        """Old and new attention on the same random inputs, layer by layer, and the whole model on a probe made from
        its config (or on `inputs`, keyword arguments of a single model's forward), by the tolerance rule. It runs the
        model; nothing is changed, and what it runs is neither recorded nor steered.

        Raises:
            RunError: when the swap is no longer in place, or a hook gives outputs of earlier steps again.
        """
        problems = self.check()
        if problems:
            raise RunError(f"verify: the swap is not in place: {problems[0]}" + _and_more(problems))
        for part, model in self._parts.items():
            hook = reusing_hook(model)
            if hook is not None:
                raise RunError(
                    f"verify: diffusers' hook {hook[1]!r} on {hook[0]} of {part} gives outputs of earlier steps again, "
                    "so that nothing would be compared: take it off (disable_cache()), verify, and put it on again"
                )
        probes = dict(self._plan.probes)
        if inputs:
            if len(self._parts) != 1:
                raise UsageError("verify: inputs go to one model's forward; swap that model, or give none")
            part, model = next(iter(self._parts.items()))
            probes = {part: functools.partial(run_model, model, inputs)}
        with contextlib.nullcontext() if self.gate is None else self.gate.paused():
            swapped = [layer for layer in self.layers if layer.is_swapped]
            return verify_swap(self._parts.values(), swapped, probes, self.undone)

    @contextlib.contextmanager
    def undone(self) -> Iterator[None]:
        """The stock attention, within the block; for comparisons."""
        steps = self._plan.steps()
        with _LOCK:
            for step in reversed(steps):
                step.undo(force=True)
            try:
                yield
            finally:
                take(steps)

    def clear_cache(self) -> None:
        """Forget cached keys and values of texts. Only needed after writing into weights or into a text through
        `tensor.data` or numpy, which torch's version counters do not see: diffusers' `EMAModel` does so, and peft's
        `hotswap_adapter`. (LoRA layers that `fuse_lora` merges or `load_lora_adapter` exchanges, and steps of
        optimizers, are noticed.)"""
        for cache in self._plan.caches:
            cache.clear()

    def cache_bytes(self) -> int:
        """Memory of the cached keys and values."""
        return sum(cache.nbytes for cache in self._plan.caches)

    def restore(self, *, force: bool = False) -> list[str]:
        """Put back every processor object, attribute, registry entry and process default as it was before.

        A layer whose attention somebody has changed since is left as it is, and named in the list that is returned;
        `force=True` puts the old one back there as well, also in a second call, which does nothing else.
        """
        with _LOCK:
            if self._is_restored:
                steps, self._left = (self._left, []) if force else ([], self._left)
            else:
                steps = self._plan.steps()[::-1]
            self._is_restored = True
            _ACTIVE.discard(self)
            names = {id(layer.step): layer.full_name for layer in self._plan.layers}
            left = []
            for step in steps:
                problem = step.undo(force=force)
                if problem is not None:
                    self._left.append(step)
                    left.append(f"{names.get(id(step), self._target)}: {problem}; left as it is")
            self.clear_cache()
            if self.gate is not None:
                self.gate.reset()
            return left

    def __enter__(self) -> Swap:
        return self

    def __exit__(self, *error: object) -> None:
        self.restore()

    def __repr__(self) -> str:
        return f"<Swap {self.report().summary()}{', restored' if self._is_restored else ''}>"


_ACTIVE: weakref.WeakSet[Swap] = weakref.WeakSet()


def _and_more(lines: list[str]) -> str:
    return f" (and {len(lines) - 1} more)" if len(lines) > 1 else ""
