"""Finding the attention layers of a transformers model, and the steps that replace their attention."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from mmattn.swap.layers import JOINT, Layer, Plan
from mmattn.swap.transformers import find, patched
from mmattn.swap.transformers.probe import heads_of, model_probe, run_interface, run_patched
from mmattn.swap.transformers.registration import Register, check_transformers
from mmattn.swap.transformers.settings import SERVED, Settings, attached, implementation_of, view_of


@dataclass(eq=False)
class UseInterface:
    """Lets one attention module call our function: it gets a view of its config that asks for it."""

    module: Any
    settings: Settings
    view: Any

    def do(self) -> None:
        """Set its config and its settings."""
        self.module.config = self.view
        self.settings.attach(self.module)

    def undo(self, *, force: bool = False) -> str | None:
        """Put its config back."""
        problem = self._displaced()
        if problem is not None and not force:
            return problem
        self.module.config = self.settings.stock
        self.settings.detach(self.module)
        return None

    def problem(self) -> str | None:
        """Whether another config is in its place, or `set_attn_implementation` has chosen masks that we cannot read."""
        implementation = implementation_of(self.view)
        if implementation not in SERVED:
            return f"the model's attention implementation was set to {implementation} since, and so were its masks"
        return self._displaced()

    def _displaced(self) -> str | None:
        if self.module.config is self.view and attached(self.module) is self.settings:
            return None
        return f"{type(self.module).__name__}.config was set to something else since"


def plan_model(model: nn.Module, part: str, backend: str, role: str | None) -> Plan:
    """What swapping one transformers model would do. Changes nothing.

    Modules that ask transformers' attention interface get a view of their config that names ours. Masks stay those
    that the model makes for its own implementation, and other modules stay as they are, to the bit. A few classes
    that ask no interface get a forward of ours; the rest is refused by name.

    Args:
        model: the model.
        part: its name, for the report.
        backend: a name of `mmattn.backends()`, or "auto".
        role: "self" or "cross" for those layers only, None for all.

    Raises:
        UsageError: when transformers' attention interface is not as expected.
    """
    check_transformers()
    plan = Plan()
    for name, module in model.named_modules():
        layer = layer_of(module, name, part)
        if layer is None:
            continue
        layer.backend = backend
        layer.chosen = role is None or layer.role == role
        plan.layers.append(layer)
        if layer.refused is None and layer.chosen:
            _set_step(layer)
    swapped = [layer for layer in plan.layers if layer.is_swapped]
    if any(isinstance(layer.step, UseInterface) for layer in swapped):
        plan.shared.append(Register())
    if swapped:
        plan.notes += _notes(swapped)
        probe = model_probe(model)
        plan.probes |= {} if probe is None else {part: probe}
    return plan


def layer_of(module: nn.Module, name: str, part: str) -> Layer | None:
    """The layer that a module is, with the reason for leaving it alone; None for other modules."""
    if isinstance(module, PreTrainedModel):  # its methods name the interface too
        return None
    cls = type(module).__name__
    layer = Layer(part, name, module, find.role_of(module, name), cls)
    if patched.forward_for(module) is not None:
        layer.refused = patched.refusal(module)
    elif find.code_of(type(module)).asks_interface:
        config = stock_config(module)
        layer.old_class = f"{cls} ({implementation_of(config) or 'eager'})"
        layer.refused = find.refusal(module, config)
        layer.features = find.features(module)
    elif find.is_attention_of_its_own(module):
        layer.refused = f"{cls}: computes its attention itself, not through transformers' attention interface"
    else:
        return None
    return layer


def stock_config(module: nn.Module) -> Any:
    """The config that a module has when it is not swapped: a copied model may be."""
    settings = attached(module)
    return getattr(module, "config", None) if settings is None else settings.stock


def _set_step(layer: Layer) -> None:
    module: Any = layer.module
    settings = Settings(layer.role, layer.backend, f"{layer.full_name} ({layer.role}-attention)")
    if patched.forward_for(module) is not None:
        layer.step = patched.patch(module, settings)
        layer.probe = functools.partial(run_patched, module, layer.role)
        return
    settings.stock = stock_config(module)
    settings.unsupported = find.code_of(type(module)).unsupported
    layer.step = UseInterface(module, settings, view_of(settings.stock))
    layer.probe = functools.partial(run_interface, module, layer.role) if heads_of(module) is not None else None


def _notes(layers: list[Layer]) -> list[str]:
    """What differs from stock on purpose."""
    classes = sorted(
        {
            type(layer.module).__name__
            for layer in layers
            if layer.role == "cross"
            and isinstance(layer.step, UseInterface)
            and implementation_of(layer.step.settings.stock) == "sdpa"
            and getattr(layer.module, "is_causal", True)
        }
    )
    notes = [
        f"{cls}: without a mask stock's sdpa makes this cross-attention causal, its eager does not; mmattn does not"
        for cls in classes
    ]
    if any(layer.role == JOINT for layer in layers):
        notes.append('layers with one softmax over context and queries are "joint": neither self nor cross')
    return notes
