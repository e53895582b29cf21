"""Several Linears over the same input as one product, for inference.

The packed weight is the storage: the Linears' own parameters become views of it, so that nothing is held
twice, `state_dict` keeps its keys and values, and a weight changed in place is changed in both.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def packing_refusals(linears: Mapping[str, nn.Module | None]) -> list[str]:
    """Why these modules cannot be packed into one product; empty when they can."""
    reasons = [f"{name} {reason}" for name, module in linears.items() if (reason := _linear_refusal(module))]
    if reasons:
        return reasons
    plain = [cast(nn.Linear, module) for module in linears.values()]
    if len({id(linear.weight) for linear in plain}) != len(plain):
        reasons.append("projections share one weight")
    if len({(linear.weight.dtype, linear.weight.device) for linear in plain}) > 1:
        reasons.append("weights differ in dtype or device")
    if len({linear.bias is None for linear in plain}) > 1:
        reasons.append("some projections have a bias and some have none")
    return reasons


def _linear_refusal(module: nn.Module | None) -> str | None:
    # The exact class: adapters, quantised layers and parametrised weights are all Linears by inheritance or wrap one.
    if type(module) is not nn.Linear:
        kind = type(module)
        return f"is a {kind.__module__}.{kind.__qualname__}, not a plain torch Linear (an adapter or quantised weight?)"
    if type(module.weight) is not nn.Parameter or not module.weight.is_floating_point():
        return "has a quantised weight or a weight of a tensor subclass"
    if is_hooked(module):
        return "has hooks, which a packed product would pass by"
    return None


def is_hooked(module: nn.Module) -> bool:
    """Has it hooks, or a `forward` of its own, which using its weights alone would pass by?"""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def _addresses(weight: Tensor, bias: Tensor | None) -> tuple[int, int]:
    return weight.data_ptr(), 0 if bias is None else bias.data_ptr()


@contextlib.contextmanager
def _as_made(weight: Tensor) -> Iterator[None]:
    """Inference mode only where the weight was made in it: as the storage of another, an inference tensor could never
    be trained again, and an ordinary tensor in the place of an inference one is neither."""
    with torch.inference_mode(weight.is_inference()), torch.no_grad():
        yield


class PackedLinears:
    """One product for several Linears of the same input width.

    Args:
        linears: Name in the owning module to Linear, in the order of the output; `packing_refusals` must be empty.

    Attributes:
        weight: `[sum of widths, C]`; bias: `[sum of widths]` or None.
        product: what inference puts in the place of `F.linear`; None: nothing.
    """

    product: Callable[[Tensor, Tensor, Tensor | None], Tensor] | None = None

    def __init__(self, linears: Mapping[str, nn.Linear]) -> None:
        parts = list(linears.values())
        with _as_made(parts[0].weight):
            self.weight = torch.cat([linear.weight for linear in parts])
            self.bias = None if parts[0].bias is None else torch.cat([linear.bias for linear in parts])
            first = 0
            for linear in parts:
                rows = slice(first, first + linear.out_features)
                linear.weight.data = self.weight[rows]
                if self.bias is not None:
                    linear.bias.data = self.bias[rows]
                first += linear.out_features
        self._parts = [
            (name, linear, linear.weight, linear.bias, _addresses(linear.weight, linear.bias))
            for name, linear in linears.items()
        ]

    def __call__(self, x: Tensor) -> Tensor:
        """The Linears' outputs of x `[..., C]` side by side, `[..., sum of widths]`."""
        return (self.product or F.linear)(x, self.weight, self.bias)

    def is_current(self, modules: Mapping[str, nn.Module | None]) -> bool:
        """Whether the owner's projections are still the Linears that were packed, with the weights in place."""
        check_storage = not torch.compiler.is_compiling()
        for name, linear, weight, bias, addresses in self._parts:
            parameters = linear._parameters
            if modules.get(name) is not linear or parameters.get("weight") is not weight:
                return False
            if parameters.get("bias") is not bias or is_hooked(linear):
                return False
            if check_storage and _addresses(weight, bias) != addresses:
                return False
        return True

    def requires_grad(self) -> bool:
        """Whether a gradient is wanted for any of the weights (the packed copy would swallow it)."""
        return any(
            weight.requires_grad or (bias is not None and bias.requires_grad) for _, _, weight, bias, _ in self._parts
        )

    def release(self) -> None:
        """Give each Linear a storage of its own again."""
        storages = {self.weight.untyped_storage().data_ptr()}
        if self.bias is not None:
            storages.add(self.bias.untyped_storage().data_ptr())
        with _as_made(self.weight):
            for _, _, weight, bias, _ in self._parts:
                for parameter in (weight, bias):
                    if parameter is not None and parameter.untyped_storage().data_ptr() in storages:
                        parameter.data = parameter.data.clone()
