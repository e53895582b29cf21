"""The attention operation (`attention.py`), its backends, masks, caches, rotary positions and observers.

What a model or a training loop of one's own needs besides `mmattn.attention` is also found here, imported on first use:
data workers need `Segments` alone, and not the compiler that the table of backends loads.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmattn.ops.cache import ContextKV as ContextKV
    from mmattn.ops.cache import KVCache as KVCache
    from mmattn.ops.observe import observing as observing
    from mmattn.ops.packed import packed_attention as packed_attention
    from mmattn.ops.registry import checkpoint_contexts as checkpoint_contexts
    from mmattn.ops.registry import explain as explain
    from mmattn.ops.segments import Segments as Segments

_EXPORTS = {
    "ContextKV": "cache",
    "KVCache": "cache",
    "Segments": "segments",
    "checkpoint_contexts": "registry",
    "explain": "registry",
    "observing": "observe",
    "packed_attention": "packed",
}
__all__ = [*_EXPORTS]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(f"mmattn.ops.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module 'mmattn.ops' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
