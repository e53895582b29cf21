"""Finding the attention layers of a diffusers model, and the steps that replace their attention."""

from __future__ import annotations

import functools
import weakref
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from diffusers.hooks._helpers import AttentionProcessorRegistry
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor2_0,
    MochiAttention,
    SanaMultiscaleLinearAttention,
)
from torch import nn

from mmattn.swap.diffusers.context_path import plan_context_path
from mmattn.swap.diffusers.contracts import CONTRACTS, features, refusal
from mmattn.swap.diffusers.dispatcher import FLEX, SET_IN_CODE, KeepProcessDefault, RegisterBackend, UseBackend
from mmattn.swap.diffusers.ip_adapter import SwappedIPAdapterAttnProcessor
from mmattn.swap.diffusers.layer import Settings, Swapped
from mmattn.swap.diffusers.model_probe import model_probe
from mmattn.swap.diffusers.padding import PaddingReader
from mmattn.swap.diffusers.probe import run_backend, run_layer
from mmattn.swap.diffusers.processors import SwappedAttnProcessor
from mmattn.swap.layers import JOINT, Layer, Options, Plan, head_count, head_dim
from mmattn.swap.parts import MOTION


@dataclass(eq=False)
class InstallProcessor:
    """Puts our processor into one attention module."""

    attn: Any
    ours: Swapped
    old: Any

    def do(self) -> None:
        """Install."""
        _INSTALLED.discard(self.attn.processor)  # of a swap whose handle is gone
        self.attn.set_processor(self.ours)
        _INSTALLED.add(self.ours)

    def undo(self, *, force: bool = False) -> str | None:
        """Put the old processor object back, unless somebody has put in another since. Processors of our class that
        diffusers has made anew (it does when an IP-Adapter is loaded) count as ours."""
        _INSTALLED.discard(self.ours)
        current = self.attn.processor
        if current is self.old:
            return None
        if isinstance(current, Swapped) or force:
            self.attn.set_processor(self.old)
            return None
        return f"{type(current).__name__} was installed since"

    def problem(self) -> str | None:
        """Whether another processor is in its place."""
        current = self.attn.processor
        if current is self.ours:
            return None
        kind = (
            "a new one of its class, without its settings" if isinstance(current, Swapped) else type(current).__name__
        )
        return (
            f"its processor was replaced by {kind} (attention slicing, IP-Adapter loading and set_attn_processor do so)"
        )


@dataclass(eq=False)
class RegisterForSkipping:
    """Lets diffusers' layer-skipping hooks know our plain processor, which they look up by exact class."""

    def do(self) -> None:
        """Register."""
        metadata = AttentionProcessorRegistry.get(AttnProcessor2_0)
        AttentionProcessorRegistry.register(SwappedAttnProcessor, metadata)

    def undo(self, *, force: bool = False) -> str | None:
        """Take it out again, when no layer has a processor of ours any more."""
        if not _INSTALLED:
            AttentionProcessorRegistry._registry.pop(SwappedAttnProcessor, None)
        return None

    def problem(self) -> str | None:
        """Whether somebody took it out."""
        is_there = SwappedAttnProcessor in AttentionProcessorRegistry._registry
        return None if is_there else "our processor is no longer registered for layer skipping"


_INSTALLED: weakref.WeakSet[Swapped] = weakref.WeakSet()  # our processors that are in place, of any swap


def plan_model(model: nn.Module, part: str, options: Options) -> Plan:
    """What swapping one diffusers model would do. Changes nothing."""
    plan = Plan()
    backends: dict[str, RegisterBackend] = {}
    padding = PaddingReader()
    for name, module in model.named_modules():
        layer = layer_of(module, name, part)
        if layer is None:
            continue
        plan.layers.append(layer)
        layer.backend = options.backend
        layer.chosen = _is_chosen(layer, options)
    sharers = _sharers(plan.layers)
    for layer in plan.layers:
        if layer.refused is not None or not layer.chosen:
            continue
        module: Any = layer.module
        if not _asks_dispatcher(module):
            step = _processor_step(module, layer, options, padding)
            layer.step, layer.probe = step, functools.partial(run_layer, module)
            plan.caches.append(step.ours.context_cache)
            continue
        sharing = sharers[id(module.processor)]
        if not all(other.chosen for other in sharing):
            layer.refused = "shares its processor object with layers that are not asked for"
            continue
        role = layer.role if all(other.role == layer.role for other in sharing) else JOINT
        backend = backends.setdefault(role, RegisterBackend(role, options.backend))
        layer.step = UseBackend(module, module.processor, backend)
        is_known = head_count(module) is not None and head_dim(module) is not None
        layer.probe = functools.partial(run_backend, module) if is_known else None
    if any(layer.is_swapped for layer in plan.layers):
        probe = model_probe(model)
        plan.probes |= {} if probe is None else {part: probe}
        plan.shared.append(KeepProcessDefault())
        if any(isinstance(layer.step, InstallProcessor) for layer in plan.layers):
            plan.shared.append(RegisterForSkipping())
        plan.shared += backends.values()
        if options.cache_context and any(layer.is_swapped and layer.role != "self" for layer in plan.layers):
            plan_context_path(model, plan)
    return plan


def _sharers(layers: list[Layer]) -> dict[int, list[Layer]]:
    """The layers that have the same processor object, by its identity: `set_attn_processor` may give all layers one."""
    sharers: dict[int, list[Layer]] = defaultdict(list)
    for layer in layers:
        sharers[id(getattr(layer.module, "processor", None))].append(layer)
    return sharers


def layer_of(module: nn.Module, name: str, part: str) -> Layer | None:
    """The layer that a module is, with the reason for leaving it alone; None for other modules."""
    if f".{MOTION}." in f".{name}.":
        part = MOTION
    if isinstance(module, SanaMultiscaleLinearAttention | MochiAttention):
        reason = f"{type(module).__name__}: " + (
            "not a class that mmattn knows" if isinstance(module, MochiAttention) else "linear attention, not a softmax"
        )
        return Layer(part, name, module, "self", type(module).__name__, refused=reason)
    if not isinstance(module, Attention | AttentionModuleMixin):
        return None
    processor = stock_of(getattr(module, "processor", None))
    role = _role(module) if isinstance(module, Attention) else _dispatcher_role(module, name)
    layer = Layer(part, name, module, role, type(processor).__name__)
    if _asks_dispatcher(module):
        if processor._attention_backend in FLEX:
            layer.refused = f"{layer.old_class}: set to diffusers' backend flex, whose block masks no other reads"
        elif layer.old_class in SET_IN_CODE:
            layer.refused = f"{layer.old_class}: names a backend of diffusers in its code, whatever it is set to"
    elif not isinstance(module, Attention):
        layer.refused = f"{layer.old_class}: does not ask diffusers' dispatcher"
    else:
        layer.refused = refusal(module, processor)
        layer.features = [] if layer.refused is not None else features(module, processor)
    return layer


def _asks_dispatcher(module: Any) -> bool:
    """Whether a layer's processor leaves attention to diffusers' dispatcher: also those of old-style modules in newer
    models (QwenImage, HunyuanVideo, Z-Image)."""
    processor = getattr(module, "processor", None)
    owner = type(processor) if isinstance(module, Attention) else processor
    return hasattr(owner, "_attention_backend") and type(processor) not in CONTRACTS


def stock_of(processor: Any) -> Any:
    """The processor that ours stands for: what a copied model, swapped when it was copied, would have had."""
    if not isinstance(processor, Swapped):
        return processor
    return processor.settings.stock if processor.settings.stock is not None else AttnProcessor2_0()


def _role(attn: Attention) -> str:
    if getattr(attn, "added_kv_proj_dim", None) is not None:  # a class below may lack all of it (HiDream's)
        return "cross" if attn.only_cross_attention else JOINT
    return "cross" if getattr(attn, "is_cross_attention", False) else "self"


def _dispatcher_role(module: Any, name: str) -> str:
    """Classes of the dispatcher world have no common way of saying it: by flag, by joint projections, by name."""
    if getattr(module, "is_cross_attention", False) or name.rsplit(".", 1)[-1] in ("attn2", "cross_attn"):
        return "cross"
    return "self" if getattr(module, "added_kv_proj_dim", None) is None else JOINT


def _is_chosen(layer: Layer, options: Options) -> bool:
    if options.parts is not None and layer.part not in options.parts:
        return False
    return options.role is None or layer.role == options.role


def _processor_step(attn: Any, layer: Layer, options: Options, padding: PaddingReader) -> InstallProcessor:
    current, stock = attn.processor, stock_of(attn.processor)
    ours = CONTRACTS[type(stock)].ours()
    if isinstance(ours, SwappedIPAdapterAttnProcessor):
        ours.adopt(stock)
    is_cross = layer.role == "cross"
    ours.settings = Settings(
        backend=options.backend,
        role=None if layer.role == JOINT else layer.role,
        cache_context=options.cache_context and layer.role != "self",
        drop_padding=options.drop_padding and is_cross,
        where=f"{layer.full_name} ({layer.role}-attention)",
        padding=padding,
        gate=options.gate if is_cross else None,
        stock=stock,
    )
    assert stock is current or isinstance(current, Swapped)
    return InstallProcessor(attn, ours, stock)
