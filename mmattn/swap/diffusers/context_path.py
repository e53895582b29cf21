"""Where a whole model must take part in keeping a projected text.

Some models project the text before their cross-attention sees it: each step would bring an equal, but new tensor, and
no layer could tell that its keys and values still hold. There the projected text is kept as one tensor. And merging a
LoRA, or putting another in its place, writes into weights where no version counter sees it: before that everything kept
is forgotten.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mmattn.swap.diffusers.fingerprint import Fingerprint, WatchOptimizers, of_autocast, of_modules, of_tensor
from mmattn.swap.diffusers.layer import Swapped
from mmattn.swap.layers import Plan, SetAttribute

# Class of the model: its module between the caller's text and the layers. Each takes one tensor, and nothing random.
PATHS = {"PixArtTransformer2DModel": "caption_projection", "UNet2DConditionModel": "encoder_hid_proj"}
WRITING = ("fuse_lora", "unfuse_lora", "load_lora_adapter")  # through `weight.data`; the last with hotswap=True


class StandIn:
    """Stands in for a method of one module, in the module's own `__dict__`; a copied module gets one of its own.

    It does not hold the module, which would be a cycle: a swapped model goes with its last reference, as a stock one.
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        self._module = weakref.ref(module)
        self.name = name
        self.owner: weakref.ref[SetStandIn] | None = None

    @property
    def module(self) -> nn.Module:
        """The module, which is there as long as anybody can call this."""
        module = self._module()
        assert module is not None
        return module

    @property
    def is_owned(self) -> bool:
        """Whether some handle will take it away. Not one of a copy, or of a swap whose handle is gone."""
        return self.owner is not None and self.owner() is not None

    def __deepcopy__(self, memo: dict[int, Any]) -> StandIn:
        copy = type(self).__new__(type(self))
        memo[id(self)] = copy
        copy.__init__(memo.get(id(self.module), self.module), self.name)
        return copy

    def __getstate__(self) -> tuple[nn.Module, str]:
        return self.module, self.name

    def __setstate__(self, state: tuple[nn.Module, str]) -> None:
        self.__init__(*state)

    def stock(self, *arguments: Any, **named: Any) -> Any:
        """What the method does by itself."""
        return getattr(type(self.module), self.name)(self.module, *arguments, **named)


class Forgetting(StandIn):
    """A method before which the model's cached texts are forgotten."""

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        for part in self.module.modules():
            processor, forward = getattr(part, "processor", None), vars(part).get("forward")
            if isinstance(processor, Swapped):
                processor.context_cache.clear()
            if isinstance(forward, Remembered):
                forward.clear()
        return self.stock(*arguments, **named)


class _Entry(NamedTuple):
    source: Fingerprint
    weights: Fingerprint
    autocast: Hashable
    context: Tensor
    output: Tensor
    version: int


class Remembered(StandIn):
    """A module's `forward`: gives the last output again while input and weights are the same."""

    is_transparent = True

    def __init__(self, module: nn.Module, name: str = "forward") -> None:
        super().__init__(module, name)
        self._entry: _Entry | None = None

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.stock(*arguments, **named)
        is_plain = len(arguments) == 1 and not named and isinstance(arguments[0], Tensor)
        if torch.is_grad_enabled() or self.module.training or not is_plain:
            self.clear()
            return self.stock(*arguments, **named)
        context: Tensor = arguments[0]
        source, weights, autocast = of_tensor(context), of_modules(self.module), of_autocast(context.device)
        entry = self._entry
        if entry is not None and source is not None and weights is not None:
            is_same = (entry.source.key, entry.weights.key, entry.autocast) == (source.key, weights.key, autocast)
            if is_same and entry.output._version == entry.version:
                return entry.output
        output = self.stock(context)
        self.clear()
        if source is not None and weights is not None and isinstance(output, Tensor) and not output.is_inference():
            self._entry = _Entry(source, weights, autocast, context, output, output._version)
        return output

    def clear(self) -> None:
        """Forget the last output."""
        self._entry = None

    @property
    def nbytes(self) -> int:
        """Memory of the output that is kept."""
        return 0 if self._entry is None else self._entry.output.nbytes


@dataclass(eq=False)
class SetStandIn(SetAttribute):
    """Sets a stand-in. One that no handle takes care of goes: what was there before is what the class has."""

    def do(self) -> None:
        """Set it."""
        if is_left_over(vars(self.target).get(self.name)):
            delattr(self.target, self.name)
        super().do()
        self.value.owner = weakref.ref(self)


def is_left_over(attribute: Any) -> bool:
    """Whether a module's own attribute is a stand-in that no handle takes care of."""
    return isinstance(attribute, StandIn) and not attribute.is_owned


def plan_context_path(model: nn.Module, plan: Plan) -> None:
    """Add the steps that a model needs whose layers keep their keys and values of the text."""
    plan.shared.append(WatchOptimizers())
    for name in WRITING:
        if hasattr(type(model), name):
            plan.shared.append(SetStandIn(model, name, Forgetting(model, name)))
    module = getattr(model, PATHS.get(type(model).__name__, ""), None)
    # encoder_hid_proj may also project pictures, from a list of tensors.
    if not isinstance(module, nn.Linear) and type(module).__name__ != "PixArtAlphaTextProjection":
        return
    assert isinstance(module, nn.Module)
    if "forward" in vars(module) and not is_left_over(vars(module)["forward"]):
        return
    remembered = Remembered(module)
    plan.shared.append(SetStandIn(module, "forward", remembered))
    plan.caches.append(remembered)
