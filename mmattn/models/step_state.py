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
        self._parts = _Parts([])

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
        parts, children = self._parts, self._parts.children()
        if not parts.modules or children != parts.seen:
            # An adapter's layer, or PEFT's copy of a layer that is trained whole.
            parts = self._parts = _Parts(list(self._network.modules()))
            children = parts.seen
        for number, own in enumerate(parts.own):
            if own["_forward_hooks"] or own["_forward_pre_hooks"]:
                self._check_hook(parts.modules[number])
        held = [own["_parameters"] for own in parts.own] + [own["_buffers"] for own in parts.own]
        tensors = [tensor for each in held for tensor in each.values()]
        structure = (
            children,
            [type(module) for module in parts.modules],
            [own["training"] for own in parts.own],
            [own.get("backend") for own in parts.own],
            [len(each) for each in held],
            [None if tensor is None else (tensor.data_ptr(), tensor.dtype) for tensor in tensors],
            [repr(getattr(module, name, None)) for module in parts.adapters for name in _ADAPTER],
            [own.get(name) for own in parts.own if "b1" in own for name in _FREEU],
        )
        given = [tensor for tensor in tensors if tensor is not None]
        return structure, tuple([0 if tensor.is_inference() else tensor._version for tensor in given])

    def _check_hook(self, module: nn.Module) -> None:
        is_own = module is self._network
        if is_own and self._runs_own_hooks:
            return
        where = self._name if is_own else f"a {type(module).__name__} of {self._name}"
        raise UsageError(
            f"compile: {where} has a forward hook, which a compiled step would pass by: remove it, or leave compile out"
        )


class _Parts:
    """The modules of a network, and what of them need not be looked up in every step.

    Attributes:
        modules: in their order.
        own: their attributes.
        adapters: those of them that PEFT has made.
        seen: their children, as they were.
    """

    def __init__(self, modules: list[nn.Module]) -> None:
        self.modules = modules
        self.own: list[dict[str, Any]] = [module.__dict__ for module in modules]
        # What diffusers' models have by that name is a method, whose `repr` would be the whole network's.
        self.adapters = [module for module in modules if isinstance(getattr(module, "disable_adapters", None), bool)]
        self.seen = self.children()

    def children(self) -> list[tuple[int, ...]]:
        """Of each module, by identity."""
        return [tuple(map(id, own["_modules"].values())) for own in self.own]
