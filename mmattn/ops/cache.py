"""Keys and values that a caller holds between calls: of a context (fixed) and of what was decoded so far (growing).

Shapes: B batch, G key/value heads, Lk keys, D head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from mmattn.errors import UsageError


@dataclass(frozen=True, eq=False)
class ContextKV:
    """Projected keys and values of a context: a picture, a source sentence, a prompt. Made once, never changed.

    Attributes:
        key: [B, G, Lk, D].
        value: [B, G, Lk, D].
        key_mask: boolean [B, Lk], True = may be attended to; None when nothing is padded.
    """

    key: Tensor
    value: Tensor
    key_mask: Tensor | None = None

    def __post_init__(self) -> None:
        """Check the shapes once, here, so that a mismatch names the context and not some later product."""
        if self.key.dim() != 4 or self.key.shape != self.value.shape:
            raise UsageError(
                f"ContextKV: key {list(self.key.shape)} and value {list(self.value.shape)} must both be [B, G, Lk, D]"
            )
        if self.key_mask is not None:
            wanted = (self.key.shape[0], self.key.shape[2])
            if self.key_mask.dtype is not torch.bool or self.key_mask.shape != wanted:
                raise UsageError(
                    f"ContextKV: key_mask is {self.key_mask.dtype} {list(self.key_mask.shape)}, "
                    f"it must be boolean [B, Lk] = {list(wanted)}"
                )

    @property
    def batch_size(self) -> int:
        """Number of contexts B."""
        return self.key.shape[0]

    @property
    def length(self) -> int:
        """Number of keys Lk, padding included."""
        return self.key.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes held by keys, values and mask."""
        return self.key.nbytes + self.value.nbytes + (0 if self.key_mask is None else self.key_mask.nbytes)

    def note_query(self, query: Tensor) -> None:
        """Told of the queries `[B, H, Lq, D]` of every attention to this context; a subclass may keep them, in a
        compiled graph too, which observers don't see."""

    def select(self, rows: Tensor) -> ContextKV:
        """The contexts at `rows` (integers [R], repeats allowed), copied."""
        rows = rows.to(self.key.device)
        key_mask = None if self.key_mask is None else self.key_mask.index_select(0, rows)
        return ContextKV(self.key.index_select(0, rows), self.value.index_select(0, rows), key_mask)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> ContextKV:
        """The same context on another device or in another dtype (of keys and values)."""
        return replace(
            self,
            key=self.key.to(device=device, dtype=dtype),
            value=self.value.to(device=device, dtype=dtype),
            key_mask=None if self.key_mask is None else self.key_mask.to(device=device),
        )


@dataclass(frozen=True, eq=False)
class WatchedContextKV(ContextKV):
    """A context that keeps the queries of every attention to it."""

    queries: list[Tensor] = field(default_factory=list)

    def note_query(self, query: Tensor) -> None:
        """See `ContextKV`."""
        self.queries.append(query)


class KVCache:
    """Keys and values of the positions decoded so far, for inference (it holds no gradients).

    Storage is preallocated. It starts at `initial_length` positions (default: all `max_length` at once) and doubles
    when full, up to `max_length`. With a `window`, only the last `window` positions are kept, in storage of at most
    twice that.

    Args:
        batch_size: rows B.
        num_kv_heads: G.
        head_dim: D.
        max_length: most positions that may ever be appended.
        dtype: of the storage.
        device: of the storage.
        initial_length: positions allocated at first.
        window: keep only so many last positions.

    Raises:
        UsageError: for sizes that are not positive.
    """

    def __init__(
        self,
        batch_size: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        max_length: int,
        dtype: torch.dtype,
        device: torch.device | str,
        initial_length: int | None = None,
        window: int | None = None,
    ) -> None:
        sizes = {"num_kv_heads": num_kv_heads, "head_dim": head_dim, "max_length": max_length}
        optional = {"initial_length": initial_length, "window": window}
        for name, size in (sizes | {n: s for n, s in optional.items() if s is not None}).items():
            if size < 1:
                raise UsageError(f"KVCache: {name} is {size}, it must be at least 1")
        if batch_size < 0:
            raise UsageError(f"KVCache: batch_size is {batch_size}, it must not be negative")
        self.max_length = max_length
        self.window = window
        # A window's storage is twice the window, so that positions move to the front only once in `window` steps.
        self._most = max_length if window is None else min(max_length, 2 * window)
        capacity = self._most if initial_length is None else min(initial_length, self._most)
        shape = (batch_size, num_kv_heads, capacity, head_dim)
        self._key = torch.empty(shape, dtype=dtype, device=device)
        self._value = torch.empty(shape, dtype=dtype, device=device)
        self._first = 0
        self._end = 0
        self._position = 0

    @property
    def batch_size(self) -> int:
        """Rows B; changes with `reorder`."""
        return self._key.shape[0]

    @property
    def length(self) -> int:
        """Positions held now (at most `window`)."""
        return self._end - self._first

    @property
    def position(self) -> int:
        """Positions appended since the start or `reset`: the position of the next token. Differs from `length` only
        when a window has dropped some."""
        return self._position

    @property
    def capacity(self) -> int:
        """Positions that fit into the storage as it is now."""
        return self._key.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of the storage."""
        return self._key.nbytes + self._value.nbytes

    def update(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append key and value [B, G, L, D]; returns views of what the L new queries may attend to, oldest first.

        Without a window the views hold every position, so `is_causal` (bottom-right aligned) fits them. With a window
        they hold the last window + L - 1: one new query sees exactly `window` keys; for L > 1 pass
        `masks.sliding_window_mask` as `attn_mask`. Views are good until the next `update`, `reorder` or `reset`.

        Raises:
            UsageError: if the sizes do not fit, gradients are wanted, or `max_length` would be passed.
        """
        batch, heads, _, head_dim = self._key.shape
        if key.shape != value.shape or key.dim() != 4 or (*key.shape[:2], key.shape[3]) != (batch, heads, head_dim):
            raise UsageError(
                f"KVCache: cannot append key {list(key.shape)}, value {list(value.shape)} to a cache of "
                f"[B, G, L, D] = [{batch}, {heads}, L, {head_dim}]"
            )
        if torch.is_grad_enabled() and (key.requires_grad or value.requires_grad):
            raise UsageError("KVCache holds no gradients: decode under torch.no_grad(), or pass no cache in training")
        added = key.shape[2]
        if self._position + added > self.max_length:
            raise UsageError(
                f"KVCache is full: {self._position} positions held and {added} more asked for, "
                f"max_length is {self.max_length}; make the cache with a larger max_length"
            )
        if self.window is not None:
            self._first = max(self._first, self._end - (self.window - 1))
        if self._end + added > self.capacity:
            self._make_room(added)
        end = self._end + added
        self._key[:, :, self._end : end] = key
        self._value[:, :, self._end : end] = value
        views = self._key[:, :, self._first : end], self._value[:, :, self._first : end]
        self._end = end
        self._position += added
        if self.window is not None:
            self._first = max(self._first, end - self.window)
        return views

    def reorder(self, rows: Tensor, *, unchanged: int = 0) -> None:
        """Row i becomes the former row `rows[i]` (integers [R]). Rows may repeat or be left out: R is the new batch.

        Args:
            rows: which rows, in which order.
            unchanged: so many positions from the start are known to be equal in row i and row `rows[i]`, and are not
                moved; only where R is the present batch.
        """
        rows = rows.to(self._key.device)
        dropped = self._position - self.length
        skipped = max(unchanged - dropped, 0) if rows.shape[0] == self.batch_size else 0
        held = slice(min(self._first + skipped, self._end), self._end)
        key, value = (stored[:, :, held].index_select(0, rows) for stored in (self._key, self._value))
        if rows.shape[0] != self.batch_size:
            shape = (rows.shape[0], *self._key.shape[1:])
            self._key, self._value = self._key.new_empty(shape), self._value.new_empty(shape)
        self._key[:, :, held], self._value[:, :, held] = key, value

    def reset(self) -> None:
        """Forget every position; the storage stays."""
        self._first = self._end = self._position = 0

    def _make_room(self, added: int) -> None:
        """Move what is held to the front, of larger storage where that is needed and allowed."""
        length = self.length
        needed = length + added
        old = capacity = self.capacity
        while capacity < needed:
            capacity *= 2
        # A first prompt longer than the window's storage gets the room that it needs.
        capacity = max(min(capacity, self._most), needed)
        for name in ("_key", "_value"):
            stored: Tensor = getattr(self, name)
            held = stored[:, :, self._first : self._end]
            if capacity == old:
                held = held.clone()
                grown = stored
            else:
                grown = stored.new_empty((*stored.shape[:2], capacity, stored.shape[3]))
            grown[:, :, :length] = held
            setattr(self, name, grown)
        self._first, self._end = 0, length
