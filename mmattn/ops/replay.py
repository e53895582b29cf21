"""Is what runs now going to be replayed as a CUDA graph? What a call costs the processor does not count then: "auto"
may choose by the card's time alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import torch

_IS_REPLAYED: ContextVar[bool] = ContextVar("mmattn_is_replayed", default=False)


@contextlib.contextmanager
def replayed() -> Iterator[None]:
    """Around what is captured as a CUDA graph, with the runs before that compile it or warm it up: within the block
    (and this thread or task only) "auto" also takes backends that cost the processor more than they save the card."""
    token = _IS_REPLAYED.set(True)
    try:
        yield
    finally:
        _IS_REPLAYED.reset(token)


@torch.compiler.assume_constant_result
def is_replayed() -> bool:
    """Within `replayed()`? torch.compile cannot trace a context variable: what it compiles keeps what was so then."""
    return _IS_REPLAYED.get()
