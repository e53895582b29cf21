"""What a backend can do, as data, and the reasons for which it must refuse a call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mmattn.ops.request import Request, Traits

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
MASKS = ("causal", "key", "boolean", "float")


@dataclass(frozen=True)
class Limits:
    """Limits of a backend.

    Attributes:
        dtypes: device type to the dtypes served there; a device that is absent is not served.
        grad_devices: device types with a backward pass.
        masks: device type to the kinds of mask served there, of `MASKS`; all of them where a device is absent.
        has_mask_grad: a float bias may need gradients.
        has_groups: fewer key/value heads than query heads.
        has_dropout: attention dropout.
        has_weights: can return the weights.
        min_head_dim: smallest head_dim.
        max_head_dim: largest head_dim; None without a bound.
    """

    dtypes: Mapping[str, tuple[torch.dtype, ...]]
    grad_devices: tuple[str, ...]
    masks: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    has_mask_grad: bool = True
    has_groups: bool = True
    has_dropout: bool = True
    has_weights: bool = False
    min_head_dim: int = 1
    max_head_dim: int | None = None

    def refusals(self, traits: Traits) -> list[str]:
        """Every reason for which a call with these features cannot be served; empty when it can."""
        reasons = []
        dtypes = self.dtypes.get(traits.device)
        if dtypes is None:
            reasons.append(f"device {traits.device} (serves {', '.join(self.dtypes)})")
        elif traits.dtype not in dtypes:
            reasons.append(
                f"dtype {dtype_name(traits.dtype)} on {traits.device} (serves {', '.join(map(dtype_name, dtypes))})"
            )
        if traits.head_dim < self.min_head_dim or (self.max_head_dim and traits.head_dim > self.max_head_dim):
            reasons.append(f"head_dim {traits.head_dim} (serves {self.min_head_dim} to {self.max_head_dim or 'any'})")
        wanted = {"causal": traits.is_causal, "key": traits.has_key_mask, traits.mask: traits.mask != "none"}
        masks = self.masks.get(traits.device, MASKS)
        for kind, is_wanted in wanted.items():
            if is_wanted and kind not in masks:
                reasons.append(f"{kind} mask on {traits.device} (serves {', '.join(masks) or 'no mask'})")
        if traits.has_grad and traits.device not in self.grad_devices:
            reasons.append(f"gradients on {traits.device} (has a backward on {', '.join(self.grad_devices) or 'none'})")
        if traits.has_mask_grad and not self.has_mask_grad:
            reasons.append("gradients of a float mask")
        if traits.is_grouped and not self.has_groups:
            reasons.append("fewer key/value heads than query heads")
        if traits.has_dropout and not self.has_dropout:
            reasons.append("dropout")
        if traits.needs_weights and not self.has_weights:
            reasons.append("returning the weights")
        return reasons


@dataclass(frozen=True)
class KnownBad:
    """A combination that is known to give wrong numbers, and what is done about it.

    Attributes:
        what: the combination, in words.
        effect: what goes wrong.
        action: what mmattn does instead.
        reference: where it is reported.
    """

    what: str
    effect: str
    action: str
    reference: str


@dataclass(frozen=True)
class Backend:
    """One way of computing attention: a row of the registry's table.

    Attributes:
        name: what users write.
        run: serves a request; returns (output [B, H, Lq, D], weights [B, H, Lq, Lk] or None).
        limits: what it can do.
        unusable: why it cannot be used on this machine, per device type of `limits`; None when it can.
        auto_devices: device types where "auto" may choose it.
        auto_note: why "auto" never chooses it elsewhere.
        known_bad: combinations that it avoids.
        packages: distributions whose versions belong in a report.
    """

    name: str
    run: Callable[[Request], tuple[Tensor, Tensor | None]]
    limits: Limits
    unusable: Callable[[str], str | None]
    auto_devices: tuple[str, ...]
    auto_note: str = ""
    known_bad: tuple[KnownBad, ...] = ()
    packages: tuple[str, ...] = field(default=("torch",))

    def refusals(self, traits: Traits) -> list[str]:
        """Every reason against serving a call with these features on this machine."""
        reasons = self.limits.refusals(traits)
        if traits.device in self.limits.dtypes:
            reason = self.unusable(traits.device)
            if reason is not None:
                reasons.append(reason)
        return reasons


def torch_device_missing(device: str) -> str | None:
    """Why torch cannot use a device type here; None when it can."""
    if device == "cpu" or (device == "cuda" and torch.cuda.is_available()):
        return None
    return f"torch {torch.__version__} sees no {device} device here"


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype as people write it, without "torch."."""
    return str(dtype).removeprefix("torch.")
