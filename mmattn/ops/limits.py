"""What a backend can do, as data, and the reasons for which it must refuse a call."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mmattn.ops.replay import is_replayed
from mmattn.ops.request import Request, Traits
from mmattn.ops.same_pass import MapsAsked, SamePassMaps
from mmattn.ops.segments import PackedRequest

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
HALVES = (torch.bfloat16, torch.float16)
# Compute capabilities of the H100 and the H200.
HOPPER = ((9, 0),)
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
        has_any_derivative: forward-mode derivatives, and those of gradients.
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
    has_any_derivative: bool = False
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

    @property
    def has_size_limits(self) -> bool:
        """Do sizes of a call decide too, besides its features?"""
        return not (self.max_keys is None and self.max_queries is None)

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

    Numbers of queries are no range: code that torch.compile made for any number then serves all others.

    Attributes:
        capabilities: compute capabilities of the cards measured.
        dtypes: of query, key and value.
        head_dims: sizes of a head.
        keys: range of Lk.
        queries: values of Lq.
        heads: range of B * H, all heads of the batch.
        with_grad: calls that need gradients; None with and without.
        with_key_mask: calls with a key mask; None with and without.
        attn_masks: kinds of `attn_mask` that calls may have, of "none", "boolean", "float".
        when_replayed_only: only within `mmattn.ops.replay.replayed()`: faster by the card's time, but not where the
            processor makes every call.
    """

    capabilities: tuple[tuple[int, int], ...]
    dtypes: tuple[torch.dtype, ...]
    head_dims: tuple[int, ...]
    keys: tuple[int, int]
    queries: tuple[int, ...]
    heads: tuple[int, int]
    with_grad: bool | None = None
    with_key_mask: bool | None = False
    attn_masks: tuple[str, ...] = ("none",)
    when_replayed_only: bool = False

    def suits(self, traits: Traits) -> bool:
        """May calls with these features be among them?"""
        return (
            traits.head_dim in self.head_dims
            and traits.mask in self.attn_masks
            and self.with_key_mask in (None, traits.has_key_mask)
            and traits.dtype in self.dtypes
            and self.with_grad in (None, traits.has_grad)
        )

    def covers(self, request: Request) -> bool:
        """Is this call, of features that suit, one of them by its sizes and its card?"""
        batch, heads, num_queries, _ = request.query.shape
        # The card first: torch.compile guards what it compiles by the sizes that are looked at.
        return (
            compute_capability(request.query.device) in self.capabilities
            and num_queries in self.queries
            and self.heads[0] <= batch * heads <= self.heads[1]
            and self.keys[0] <= request.key.shape[2] <= self.keys[1]
        )


@torch.compiler.assume_constant_result
def compute_capability(device: torch.device) -> tuple[int, int]:
    """Of a CUDA device."""
    return _capability_of(device)


@functools.cache
def _capability_of(device: torch.device) -> tuple[int, int]:
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
        auto_packed_mean_keys: "auto" takes it for packed sequences of at most so many keys on the average, which may
            depend on the call's card, types and sizes; for all when None.
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
    auto_packed_mean_keys: Callable[[PackedRequest], int] | None = None
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

    def auto_refusals(self, traits: Traits) -> list[str]:
        """Why "auto" does not choose it for calls with these features."""
        if traits.device not in self.auto_devices:
            return [f"auto does not choose it on {traits.device}: {self.auto_note}"]
        if traits.wants_any_derivative and not self.limits.has_any_derivative:
            return ["auto does not choose it within forward-mode derivatives, or those of gradients: it has none"]
        shapes = self.auto_shapes_for(traits)
        return [self._not_measured] if shapes is not None and not shapes else []

    def auto_shapes_for(self, traits: Traits) -> tuple[AutoShape, ...] | None:
        """Those of `auto_shapes` that calls with these features may be among; None where sizes do not matter."""
        if self.auto_shapes is None:
            return None
        return tuple(shape for shape in self.auto_shapes if shape.suits(traits))

    def suits_packed(self, request: PackedRequest) -> bool:
        """May "auto" choose it for packed sequences of these lengths?"""
        most = self.auto_packed_mean_keys
        return most is None or request.key.shape[0] <= most(request) * len(request.key_segments)

    def auto_queries(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> set[int]:
        """Numbers of queries of those of `auto_shapes` that were measured on such a device, with such heads."""
        shapes = [each for each in self.auto_shapes or () if dtype in each.dtypes and head_dim in each.head_dims]
        return {number for each in shapes if compute_capability(device) in each.capabilities for number in each.queries}

    def auto_size_refusals(self, request: Request, traits: Traits) -> list[str]:
        """Why "auto" does not choose it for this call, of which it may choose some."""
        shapes = self.auto_shapes_for(traits)
        if shapes is None or auto_takes(shapes, request):
            return []
        if any(shape.covers(request) for shape in shapes):
            return [f"auto chooses it for this call only where it is replayed as a CUDA graph: {self.auto_note}"]
        return [self._not_measured]

    @property
    def _not_measured(self) -> str:
        return f"auto chooses it only where it was measured to be the fastest: {self.auto_note}"


def auto_takes(shapes: tuple[AutoShape, ...], request: Request) -> bool:
    """Is a call one of these, all of which suit its features?"""
    return any((is_replayed() or not shape.when_replayed_only) and shape.covers(request) for shape in shapes)


@torch.compiler.assume_constant_result
def torch_device_missing(device: str) -> str | None:
    """Why torch cannot use a device type here; None when it can."""
    if device == "cpu" or (device == "cuda" and torch.cuda.is_available()):
        return None
    return f"torch {torch.__version__} sees no {device} device here"


# torch.compile traces neither what is asked here, nor functions that remember.
@torch.compiler.assume_constant_result
def ampere_missing(device: str) -> str | None:
    """Why kernels for NVIDIA cards from the A100 on cannot be used here; None when they can."""
    return _ampere_missing(device)


@functools.cache
def _ampere_missing(device: str) -> str | None:
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
