"""Masks of diffusers models: additive, 0 or -10000. Read back into padding, so that it can be left out exactly."""

from __future__ import annotations

from collections.abc import Hashable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from mmattn.errors import UsageError

_MASKED = -9000.0  # -10000, and what half types make of it; exp of it is 0 in every float type


@dataclass(frozen=True, eq=False)
class ValidKeys:
    """Which keys of each row are real.

    Attributes:
        index: [B, L] places of the keys to keep, padded with some other key; None keeps the first `length` of each row.
        length: how many keys are kept.
        total: of how many.
        key_mask: boolean [B, length] over what is kept; None when all of it is real.
        identity: equal for equal masks.
    """

    index: Tensor | None
    length: int
    total: int
    key_mask: Tensor | None
    identity: Hashable

    def keep(self, context: Tensor) -> Tensor:
        """[B, Lk, C] to [B, length, C]."""
        if self.index is None:
            return context[:, : self.length]
        return context.gather(1, self.index.unsqueeze(-1).expand(-1, -1, context.shape[-1]))


_KEPT: ContextVar[tuple[ref[Any], ValidKeys | None] | None] = ContextVar("mmattn_kept_keys", default=None)


def note_kept(processor: Any, valid: ValidKeys | None) -> None:
    """Remember which keys a processor's call keeps, for whoever looks at it in this thread or task."""
    _KEPT.set((ref(processor), valid))


def kept_keys(processor: Any) -> ValidKeys | None:
    """Which keys the processor's latest call has kept here; None: all of them, or another's call was the latest."""
    latest = _KEPT.get()
    return None if latest is None or latest[0]() is not processor else latest[1]


class PaddingReader:
    """Reads masks, each one once: all layers of a model get the same tensor. The mask is brought to the host."""

    def __init__(self) -> None:
        self._last: tuple[Tensor, int, ValidKeys | None] | None = None

    def __deepcopy__(self, memo: dict[int, object]) -> PaddingReader:
        return PaddingReader()

    def __reduce__(self) -> tuple[type[PaddingReader], tuple[()]]:
        return PaddingReader, ()

    def read(self, mask: Tensor, batch: int) -> ValidKeys | None:
        """What a mask [B, Lk] or [B, 1, Lk] says; None when it is no padding mask, or leaves a row without a key."""
        version = -1 if mask.is_inference() else mask._version
        last = self._last
        if last is not None and last[0] is mask and last[1] == version >= 0:
            return last[2]
        valid = read_padding(mask, batch)
        self._last = (mask, version, valid)
        return valid


def read_padding(mask: Tensor, batch: int) -> ValidKeys | None:
    """See `PaddingReader.read`."""
    if mask.dim() == 3 and mask.shape[1] == 1:
        mask = mask[:, 0]
    if mask.dim() != 2 or mask.shape[0] != batch or not mask.numel() or mask.requires_grad:
        return None
    host = mask.detach().to("cpu")
    allowed = host if host.dtype is torch.bool else host == 0
    if host.dtype is not torch.bool and not (allowed | (host <= _MASKED)).all():
        return None
    lengths = allowed.sum(1)
    longest = int(lengths.max())
    if not lengths.all():
        return None
    identity = (allowed.shape, allowed.numpy().tobytes())
    prefixes = torch.arange(longest) < lengths.unsqueeze(1)
    is_prefix = torch.equal(allowed[:, :longest], prefixes)
    # A stable sort puts the real keys first, in their order.
    index = None if is_prefix else (~allowed).to(torch.uint8).sort(dim=1, stable=True).indices[:, :longest]
    kept = None if prefixes.all() else prefixes
    device = mask.device
    return ValidKeys(
        None if index is None else index.to(device),
        longest,
        allowed.shape[1],
        None if kept is None else kept.to(device),
        identity,
    )


def as_bias(mask: Tensor, batch: int, heads: int, num_keys: int, *, where: str) -> Tensor:
    """A layer's `attention_mask` as a mask that broadcasts to [B, H, Lq, Lk], without a copy for each head.

    Diffusers gives [B, Lk], [B, 1 or Lq, Lk] or [B x H, 1 or Lq, Lk].

    Raises:
        UsageError: when it is none of these.
    """
    if mask.shape[-1] == num_keys:
        if mask.dim() == 4 and mask.shape[0] in (1, batch) and mask.shape[1] in (1, heads):
            return mask
        three = mask.unsqueeze(1) if mask.dim() == 2 else mask
        if three.dim() == 3 and three.shape[0] == batch:
            return three.unsqueeze(1)
        if three.dim() == 3 and three.shape[0] == batch * heads:
            return three.unflatten(0, (batch, heads))
    raise UsageError(
        f"attention_mask {list(mask.shape)} does not fit {where}: batch {batch}, {heads} heads, {num_keys} keys; give "
        "the pipeline a mask of [batch, number of text tokens]"
    )
