"""What a float mask says of keys, in the form in which calls that may not look at it need it."""

from __future__ import annotations

import weakref
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from mmattn.kernels.plain import is_plain_call

Parts = tuple[Tensor, Tensor]
_LAST: ContextVar[tuple[Any, Any, Parts] | None] = ContextVar("mmattn_last_bias", default=None)


def parts_of_bias(mask: Tensor) -> Parts:
    """Which keys a float mask [b, h, 1, Lk] leaves, boolean [b, h, Lk, 1], and the mask with zeros in rows without any.

    Remembered for the mask that was given last, until it is written to: every layer of a model is given the same.
    """
    place = _place(mask)
    if place is None:
        return _parts(mask)
    owner, last = mask if mask._base is None else mask._base, _LAST.get()
    if last is not None and last[0]() is owner and last[1] == place:
        return last[2]
    parts = _parts(mask)
    _LAST.set((weakref.ref(owner), place, parts))
    return parts


def _parts(mask: Tensor) -> Parts:
    allowed = mask > float("-inf")
    empty = ~allowed.any(dim=-1, keepdim=True)
    return allowed.transpose(2, 3), mask.masked_fill(empty, 0.0)


def _place(mask: Tensor) -> tuple[Any, ...] | None:
    """Where its numbers are, and how often they were written to; None where that is not known, where its gradient is
    wanted, and where what is made now is there later only (a CUDA graph that is captured)."""
    if not is_plain_call(mask) or mask.requires_grad or mask.is_inference():
        return None
    stream = None
    if mask.is_cuda:
        if torch.cuda.is_current_stream_capturing():
            return None
        stream = torch.cuda.current_stream(mask.device).cuda_stream
    return mask.data_ptr(), mask.shape, mask.stride(), mask.dtype, mask._version, stream
