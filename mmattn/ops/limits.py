"""What a backend can do, as data, and the reasons for which it must refuse a call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mmattn.ops.request import Request, Traits
from mmattn.ops.same_pass import MapsAsked, SamePassMaps
from mmattn.ops.segments import PackedRequest

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
MASKS = ("causal", "key", "boolean", "float")


@dataclass(frozen=True)
class Limits:
    """Limits of a backend.

    Attributes:
        dtypes: device type to the dtypes served there; a device that is absent is not served.
        grad_devices: device types with a backward pass.
        masks: device type to the kinds of mask served there, of `MASKS`; all of them where a device is absent.
        has_causal_key_mask: a call may have a causal and a key mask.
        has_mask_grad: a float bias may need gradients.
        has_groups: fewer key/value heads than query heads.
        has_dropout: attention dropout.
        has_weights: can return the weights.
        min_head_dim: smallest head_dim.
        max_head_dim: largest head_dim; None without a bound.
        head_dim_step: head_dim must be a multiple of it.
        max_keys: most keys; None without a bound.
        max_queries: most queries; None without a bound.
    """

    dtypes: Mapping[str, tuple[torch.dtype, ...]]
    grad_devices: tuple[str, ...]
    masks: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    has_causal_key_mask: bool = True
    has_mask_grad: bool = True
    has_groups: bool = True
    has_dropout: bool = True
    has_weights: bool = False
    min_head_dim: int = 1
    max_head_dim: int | None = None
    head_dim_step: int = 1
    max_keys: int | None = None
    max_queries: int | None = None

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
        if traits.head_dim % self.head_dim_step:
            reasons.append(f"head_dim {traits.head_dim} (serves multiples of {self.head_dim_step})")
        wanted = {"causal": traits.is_causal, "key": traits.has_key_mask, traits.mask: traits.mask != "none"}
        masks = self.masks.get(traits.device, MASKS)
        for kind, is_wanted in wanted.items():
            if is_wanted and kind not in masks:
                reasons.append(f"{kind} mask on {traits.device} (serves {', '.join(masks) or 'no mask'})")
        if traits.is_causal and traits.has_key_mask and not self.has_causal_key_mask:
            reasons.append("a causal and a key mask in one call")
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

    def size_refusals(self, request: Request) -> list[str]:
        """Reasons that lie in sizes which `Traits` leaves out, because they change from call to call."""
        reasons = []
        num_queries, num_keys = request.query.shape[2], request.key.shape[2]
        if self.max_keys is not None and num_keys > self.max_keys:
            reasons.append(f"{num_keys} keys (serves at most {self.max_keys})")
        if self.max_queries is not None and num_queries > self.max_queries:
            reasons.append(f"{num_queries} queries (serves at most {self.max_queries})")
        return reasons


@dataclass(frozen=True)
class AutoShape:
    """Calls for which a backend was measured to be the fastest: "auto" takes it for these. Ranges include both ends.

    Attributes:
        capabilities: compute capabilities of the cards measured.
        dtypes: of query, key and value.
        head_dims: sizes of a head.
        keys: range of Lk.
        queries: range of Lq.
        heads: range of B * H, all heads of the batch.
        with_grad: calls that need gradients; None with and without.
        with_key_mask: calls with a key mask; None with and without. (Calls with `attn_mask` are never these.)
    """

    capabilities: tuple[tuple[int, int], ...]
    dtypes: tuple[torch.dtype, ...]
    head_dims: tuple[int, ...]
    keys: tuple[int, int]
    queries: tuple[int, int]
    heads: tuple[int, int]
    with_grad: bool | None = None
    with_key_mask: bool | None = False

    def covers(self, request: Request, traits: Traits) -> bool:
        """Is this one of those calls?"""
        # Most calls that are not end here, at little cost: every call of "auto" is asked.
        if traits.head_dim not in self.head_dims or traits.mask != "none":
            return False
        batch, heads, num_queries, _ = request.query.shape
        return (
            self.with_key_mask in (None, traits.has_key_mask)
            and traits.dtype in self.dtypes
            and self.with_grad in (None, traits.has_grad)
            and self.keys[0] <= request.key.shape[2] <= self.keys[1]
            and self.queries[0] <= num_queries <= self.queries[1]
            and self.heads[0] <= batch * heads <= self.heads[1]
            and _capability(request.query.device) in self.capabilities
        )


@torch.compiler.assume_constant_result
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


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
        run_packed: serves packed sequences, as `run` does padded ones; returns output [N, H, D]. None where it knows
            none: `packed_attention` pads for it. "auto" takes the first row that has one and can serve.
        run_with_maps: as `run`, with the same output bit for bit, and the weights that an observer asks for from the
            same pass. None where it has none.
        auto_devices: device types where "auto" may choose it.
        auto_note: why "auto" never chooses it elsewhere.
        auto_shapes: calls for which "auto" may choose it there; all when None.
        known_bad: combinations that it avoids.
        packages: distributions whose versions belong in a report.
    """

    name: str
    run: Callable[[Request], tuple[Tensor, Tensor | None]]
    limits: Limits
    unusable: Callable[[str], str | None]
    auto_devices: tuple[str, ...]
    auto_note: str = ""
    auto_shapes: tuple[AutoShape, ...] | None = None
    run_packed: Callable[[PackedRequest], Tensor] | None = None
    run_with_maps: Callable[[Request, MapsAsked], tuple[Tensor, SamePassMaps]] | None = None
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

    @property
    def has_size_limits(self) -> bool:
        """Do sizes of a call decide too, besides its features?"""
        limits = self.limits
        return not (limits.max_keys is None and limits.max_queries is None and self.auto_shapes is None)

    def auto_refusals(self, traits: Traits) -> list[str]:
        """Why "auto" does not choose it for calls with these features."""
        if traits.device in self.auto_devices:
            return []
        return [f"auto does not choose it on {traits.device}: {self.auto_note}"]

    def auto_size_refusals(self, request: Request, traits: Traits) -> list[str]:
        """Why "auto" does not choose it for this call, of which it may choose some."""
        if self.auto_shapes is None or any(shape.covers(request, traits) for shape in self.auto_shapes):
            return []
        return [f"auto chooses it only where it was measured to be the fastest: {self.auto_note}"]


def torch_device_missing(device: str) -> str | None:
    """Why torch cannot use a device type here; None when it can."""
    if device == "cpu" or (device == "cuda" and torch.cuda.is_available()):
        return None
    return f"torch {torch.__version__} sees no {device} device here"


def ampere_missing(device: str) -> str | None:
    """Why kernels for NVIDIA cards from the A100 on cannot be used here; None when they can."""
    missing = torch_device_missing(device)
    if missing is not None:
        return missing
    if torch.version.hip:
        return "not tried on AMD"
    capability = torch.cuda.get_device_capability()
    if capability < (8, 0):
        return f"needs compute capability 8.0 (A100 and newer), this card has {capability[0]}.{capability[1]}"
    return None


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype as people write it, without "torch."."""
    return str(dtype).removeprefix("torch.")
