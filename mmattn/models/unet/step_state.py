"""What a compiled or captured step of a U-Net depends on, so that a change of it is seen."""

from __future__ import annotations

from typing import Any

from torch import nn

from mmattn.errors import UsageError

_ADAPTER = ("scaling", "active_adapters", "merged_adapters", "disable_adapters", "use_dora")
_FREEU = ("s1", "s2", "b1", "b2")


class StepState:
    """Reads the state of a network before every step, so it is made to be quick."""

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self._parts: list[tuple[nn.Module, tuple[int, ...]]] = []

    def check_forwards(self) -> None:
        """Raise on what stands in a forward's way, which a captured step would pass by.

        Raises:
            UsageError: naming the part that has one.
        """
        for name, module in self._network.named_modules():
            if hasattr(module, "_hf_hook") or hasattr(module, "_diffusers_hook") or "forward" in module.__dict__:
                raise UsageError(
                    f"compile: {name or 'the U-Net'} has another forward or hooks of accelerate or diffusers"
                    " (offloading, casting, attention that is recorded or steered): remove them, or leave compile out"
                )

    def read(self) -> tuple[tuple[Any, ...], tuple[int, ...]]:
        """What a step was made for, and what the keys and values of a text were made from.

        The first: parts, addresses of the weights, adapters with their scales, FreeU. The second: versions of the
        weights.

        Raises:
            UsageError: a forward hook on a part, which a captured step would pass by.
        """
        if not self._parts or any(_children(module) != children for module, children in self._parts):
            self._parts = [(module, _children(module)) for module in self._network.modules()]
        structure: list[Any] = []
        versions: list[int] = []
        for module, children in self._parts:
            structure.append(children)
            for tensors in (module._parameters, module._buffers):
                for tensor in tensors.values():
                    if tensor is not None:
                        structure.append(tensor.data_ptr())
                        versions.append(0 if tensor.is_inference() else tensor._version)
            own = module.__dict__
            if "scaling" in own:  # an adapter's layer
                structure += [repr(getattr(module, name, None)) for name in _ADAPTER]
            if "b1" in own:
                structure += [own.get(name) for name in _FREEU]
            if (module._forward_hooks or module._forward_pre_hooks) and module is not self._network:
                raise UsageError(
                    f"compile: a {type(module).__name__} of the U-Net has a forward hook, which a compiled step would"
                    " pass by: remove it, or leave compile out"
                )
        return tuple(structure), tuple(versions)


def _children(module: nn.Module) -> tuple[int, ...]:
    return tuple(map(id, module._modules.values()))
