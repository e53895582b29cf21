"""Proof that a swap computes the same: layer by layer, and the whole model on a probe."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from mmattn.errors import MmattnError, RunError
from mmattn.ops.tolerance import FORWARD_FACTOR, Deviation, deviation
from mmattn.swap.attend import computing_reference
from mmattn.swap.layers import Layer

Probe = Callable[[], Tensor]
_VERIFYING: ContextVar[bool] = ContextVar("mmattn_verifying", default=False)


class ProbeError(RunError):
    """Raised by a whole model's probe: the model does not take the inputs that were made from its config."""


@contextlib.contextmanager
def probing() -> Iterator[None]:
    """Within the block, whatever a model raises for the inputs that were made from its config is a `ProbeError`."""
    try:
        yield
    except MmattnError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
        raise ProbeError(f"it does not take the probe made from its config: {reason}") from error


@dataclass(frozen=True)
class Verdict:
    """One comparison.

    Attributes:
        name: the layer, or the part of the pipeline.
        to_stock: largest difference between stock's output and ours.
        deviation: of ours from the output with attention in float64, and what the tolerance rule allows.
    """

    name: str
    to_stock: float
    deviation: Deviation

    @property
    def is_ok(self) -> bool:
        """Whether ours keeps the rule, and stock too: then they differ by no more than twice the bound. The reference
        runs through our code, so only stock shows whether that code is right."""
        return self.deviation.is_within and self.to_stock <= 2 * self.deviation.bound

    def __str__(self) -> str:
        verdict = "ok" if self.is_ok else "BEYOND"
        return (
            f"{self.name}: to stock {self.to_stock:.2g}, to float64 {self.deviation.error:.2g} "
            f"(allowed {self.deviation.bound:.2g}) {verdict}"
        )


@dataclass(frozen=True)
class Verification:
    """What `Swap.verify` found; prints as text.

    Attributes:
        layers: for every layer that can be run by itself.
        models: for every part that a probe is known for.
        unprobed: layers and parts that could not be run.
    """

    layers: list[Verdict]
    models: list[Verdict]
    unprobed: list[str]

    @property
    def is_ok(self) -> bool:
        """Whether something was compared, and all of it is within the rule."""
        verdicts = [*self.layers, *self.models]
        return bool(verdicts) and all(verdict.is_ok for verdict in verdicts)

    def __str__(self) -> str:
        lines = [f"whole {verdict}" for verdict in self.models]
        if self.layers:
            worst = max(self.layers, key=lambda verdict: verdict.to_stock)
            bad = [verdict for verdict in self.layers if not verdict.is_ok]
            lines.append(f"{len(self.layers)} layers, {len(self.layers) - len(bad)} within tolerance; worst {worst}")
            lines += [f"  {verdict}" for verdict in bad]
        if self.unprobed:
            lines.append(f"not compared by themselves: {', '.join(self.unprobed)}")
        found = "same output" if self.is_ok else "NOT the same output"
        if not self.layers and not self.models:
            found = "nothing was compared: give verify(**inputs) inputs of the model's forward"
        return "\n".join([*lines, found])


def is_verifying() -> bool:
    """Whether what runs here is a probe, which is to be neither recorded nor steered."""
    return _VERIFYING.get()


def verify_swap(
    models: Iterable[nn.Module],
    layers: list[Layer],
    probes: dict[str, Probe],
    undone: Callable[[], contextlib.AbstractContextManager[None]],
) -> Verification:
    """Run every probe with the swap undone, in place, and with attention by the specification. A model that stock
    cannot run on its probe is left out, and named. Nothing runs compiled: no reference reaches there."""
    alone = {layer.full_name: layer.probe for layer in layers if layer.probe is not None}
    unprobed = sorted({layer.part for layer in layers if layer.probe is None} - set(probes))
    with torch.no_grad(), _evaluating(models), _verifying(), torch.compiler.set_stance("force_eager"):
        with undone():
            stock = {name: _two_ways(probe) for name, probe in alone.items()}
            stock_models: dict[str, tuple[Tensor, Tensor]] = {}
            for name, probe in probes.items():
                try:
                    stock_models[name] = _two_ways(probe)
                except ProbeError as reason:
                    unprobed.append(f"{name} ({reason})")
        ours = {name: _three_ways(probe) for name, probe in alone.items()}
        our_models = {name: _three_ways(probes[name]) for name in stock_models}
    return Verification(
        [_verdict(name, *stock[name], *ours[name]) for name in ours],
        [_verdict(name, *stock_models[name], *our_models[name]) for name in our_models],
        unprobed,
    )


def reusing_hook(model: nn.Module) -> tuple[str, str] | None:
    """A module's name and that of a hook of diffusers on it that keeps outputs from step to step (Pyramid Attention
    Broadcast, FasterCache, first block cache, ...): probes would get and leave outputs that are not theirs."""
    for name, module in model.named_modules():
        registry = getattr(module, "_diffusers_hook", None)
        for kind, hook in getattr(registry, "hooks", {}).items():
            if getattr(hook, "_is_stateful", False):
                return name or type(model).__name__, kind
    return None


def run_model(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """The first float tensor of a model's output, everything else dropped."""
    return first_tensor(model(**inputs))


def first_tensor(output: Any) -> Tensor:
    """The first float tensor in an output of nested tuples, lists and dicts."""
    if isinstance(output, Tensor) and output.is_floating_point():
        return output
    values = output.values() if isinstance(output, dict) else output if isinstance(output, (list, tuple)) else ()
    for value in values:
        with contextlib.suppress(LookupError):
            return first_tensor(value)
    sample = getattr(output, "sample", None)
    if isinstance(sample, Tensor):
        return sample
    raise LookupError(f"no float tensor in a {type(output).__name__}")


class _ExactSdpa(TorchFunctionMode):
    """Within it torch's own fused attention computes in float64, and rounds at the end."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        query: Tensor = args[0] if args else kwargs["query"]
        with torch.autocast(query.device.type, enabled=False), sdpa_kernel(SDPBackend.MATH):
            output = func(*map(_doubled, args), **{name: _doubled(value) for name, value in kwargs.items()})
        return output.to(query.dtype)


def _doubled(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _two_ways(probe: Probe) -> tuple[Tensor, Tensor]:
    stock = probe()
    with _ExactSdpa():
        return stock, probe()


def _three_ways(probe: Probe) -> tuple[Tensor, Tensor, Tensor]:
    ours = probe()
    with computing_reference("eager"):
        eager = probe()
    with computing_reference("float64"):
        reference = probe()
    return ours, eager, reference


def _verdict(name: str, stock: Tensor, exact: Tensor, ours: Tensor, eager: Tensor, reference: Tensor) -> Verdict:
    # Stock's kernel may round more than eager does (weights of a half type, say): ours may then do so as well.
    more = max(0.0, _distance(stock, exact) - _distance(eager, reference))
    return Verdict(name, _distance(stock, ours), deviation(ours, eager, reference, unavoidable=FORWARD_FACTOR * more))


def _distance(one: Tensor, other: Tensor) -> float:
    return (one.double() - other.double()).abs().max().item() if one.numel() else 0.0


@contextlib.contextmanager
def _verifying() -> Iterator[None]:
    token = _VERIFYING.set(True)
    try:
        yield
    finally:
        _VERIFYING.reset(token)


@contextlib.contextmanager
def _evaluating(models: Iterable[nn.Module]) -> Iterator[None]:
    """Dropout off, and back."""
    before = [(part, part.training) for model in models for part in model.modules()]
    try:
        for part, _ in before:
            part.training = False
        yield
    finally:
        for part, was_training in before:
            part.training = was_training
