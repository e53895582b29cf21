"""What a compiled or captured step of a network depends on, so that a change of it is seen."""

from __future__ import annotations

from typing import Any

from torch import nn

from mmattn.errors import UsageError

_ADAPTER = ("scaling", "active_adapters", "merged_adapters", "disable_adapters", "use_dora")
_FREEU = ("s1", "s2", "b1", "b2")


class StepState:
    """Reads the state of a network before every step, so it is made to be quick.

    Args:
        network: what a step runs.
        name: of the network, in messages.
        runs_own_hooks: the network's own forward hooks run whatever is captured, as a step is taken by calling it.
    """

    def __init__(self, network: nn.Module, name: str, *, runs_own_hooks: bool = False) -> None:
        self._network, self._name, self._runs_own_hooks = network, name, runs_own_hooks
        self._parts: list[tuple[nn.Module, tuple[int, ...], bool]] = []

    def check_forwards(self) -> None:
        """Raise on what stands in a forward's way, which a captured step would pass by.

        Raises:
            UsageError: naming the part that has one.
        """
        for name, module in self._network.named_modules():
            if hasattr(module, "_hf_hook") or hasattr(module, "_diffusers_hook") or "forward" in module.__dict__:
                raise UsageError(
                    f"compile: {name or self._name} has another forward or hooks of accelerate or diffusers"
                    " (offloading, casting, attention that is recorded or steered): remove them, or leave compile out"
                )

    def read(self) -> tuple[tuple[Any, ...], tuple[int, ...]]:
        """What a step was made for, and what the keys and values of a text were made from.

        The first: parts and their modes, addresses and dtypes of the weights, attention's backends, adapters with their
        scales, FreeU. The second: versions of the weights, which a write through `tensor.data` leaves as they are.

        Raises:
            UsageError: a forward hook on a part, which a captured step would pass by.
        """
        if not self._parts or any(_children(module) != children for module, children, _ in self._parts):
            # An adapter's layer, or PEFT's copy of a layer that is trained whole.
            self._parts = [
                (module, _children(module), hasattr(module, "disable_adapters")) for module in self._network.modules()
            ]
        structure: list[Any] = []
        versions: list[int] = []
        for module, children, is_adapter in self._parts:
            own = module.__dict__
            structure += (type(module), children, module.training, own.get("backend"))
            for tensors in (module._parameters, module._buffers):
                for tensor in tensors.values():
                    if tensor is not None:
                        structure += (tensor.data_ptr(), tensor.dtype)
                        versions.append(0 if tensor.is_inference() else tensor._version)
            if is_adapter:
                structure += [repr(getattr(module, name, None)) for name in _ADAPTER]
            if "b1" in own:
                structure += [own.get(name) for name in _FREEU]
            if module._forward_hooks or module._forward_pre_hooks:
                self._check_hook(module)
        return tuple(structure), tuple(versions)

    def _check_hook(self, module: nn.Module) -> None:
        is_own = module is self._network
        if is_own and self._runs_own_hooks:
            return
        where = self._name if is_own else f"a {type(module).__name__} of {self._name}"
        raise UsageError(
            f"compile: {where} has a forward hook, which a compiled step would pass by: remove it, or leave compile out"
        )


def _children(module: nn.Module) -> tuple[int, ...]:
    return tuple(map(id, module._modules.values()))
