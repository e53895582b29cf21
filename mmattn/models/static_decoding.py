"""Decoding with static shapes: every step of a text runs in the same buffers, so that it can be compiled or captured
once.

B contexts, n rows of each, Ls places for a context's tokens, T for a row's own, G key/value heads, D head_dim,
V vocabulary. Sizes are rounded up to buckets; rows, contexts and places beyond what is needed are computed and unread.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from mmattn.errors import UsageError
from mmattn.models.compiled_steps import check_unwatched
from mmattn.models.decoding import DecoderState, LayerContexts, StepDecoder, weight_of
from mmattn.nn import SelfAttention, TransformerLayer
from mmattn.ops.cache import KVCache

SHORTEST_SOURCE = 16
SMALLEST_CAPACITY = 64
# How many steps a device may be ahead of the loop that looks for texts that have ended. On a CPU looking is free.
STOP_EVERY = {"cpu": 1, "cuda": 8}


@dataclass(frozen=True)
class StepShape:
    """The sizes that a step is made for.

    Attributes:
        batch: B.
        rows: n.
        source: Ls.
        capacity: T.
        reads_alignment: whether the step also gives the weights of an attention to the context.
        is_masked: whether contexts may be shorter than Ls.
    """

    batch: int
    rows: int
    source: int
    capacity: int
    reads_alignment: bool = False
    is_masked: bool = True


def bucket(size: int, smallest: int = 1) -> int:
    """`smallest`, doubled until it holds `size`."""
    while smallest < size:
        smallest *= 2
    return smallest


class StepBuffers:
    """What a step reads and writes, at fixed addresses.

    Args:
        shape: the sizes.
        decoder: whose layers they are for.

    Attributes:
        ids: int64 `[B, n]`, the tokens to be read.
        position: int64 `[1]`, their position.
        window: int64 `[1]`, how many last positions are seen.
        caches: for each layer `[B, n, 2 * G, T, D]`, see `StaticKVCache`.
        contexts: for each layer `[B, 2 * G, Ls, D]`, keys and then values; None where it does not attend to any.
        key_mask: bool `[B, Ls]`; None where no context is shorter than Ls.
        run: takes the step; returns logits `[B * n, V]`, and weights `[B * n, Ls]` where the shape asks for them, both
            good until the next call.
        made_for: the lender's note on what they may be lent again for.
    """

    run: Callable[[], tuple[Tensor, Tensor | None]]
    made_for: tuple[Any, ...] = ()

    def __init__(self, shape: StepShape, decoder: StepDecoder) -> None:
        self.shape = shape
        weight = weight_of(cast(TransformerLayer, decoder.layers[0]))
        # Buffers outlive the call that makes them, which may be in inference mode.
        with torch.inference_mode(False):
            self.ids = torch.zeros(shape.batch, shape.rows, dtype=torch.int64, device=weight.device)
            self.position = torch.zeros(1, dtype=torch.int64, device=weight.device)
            self.window = torch.full_like(self.position, shape.capacity)
            self.key_mask: Tensor | None = None
            if shape.is_masked:
                self.key_mask = torch.zeros(shape.batch, shape.source, dtype=torch.bool, device=weight.device)
            self.caches: list[Tensor] = []
            self.contexts: list[Tensor | None] = []
            for layer in cast("Sequence[TransformerLayer]", decoder.layers):
                own = cast(SelfAttention, layer.self_attn)
                sizes = (shape.batch, shape.rows, 2 * own.num_kv_heads, shape.capacity, own.head_dim)
                self.caches.append(weight.new_zeros(sizes))
            for cross in decoder.context_attentions:
                if cross is None:
                    self.contexts.append(None)
                    continue
                sizes = (shape.batch, 2 * cross.num_kv_heads, shape.source, cross.head_dim)
                self.contexts.append(weight.new_zeros(sizes))

    @property
    def cache_bytes(self) -> int:
        """Bytes of the self-attention caches."""
        return sum(cache.nbytes for cache in self.caches)

    @property
    def context_bytes(self) -> int:
        """Bytes of the contexts' keys, values and mask."""
        return sum(held.nbytes for held in self._held)

    @property
    def tensors(self) -> tuple[Any, ...]:
        """What the step takes."""
        return self.ids, self.position, self.window, self.caches, self.contexts, self.key_mask

    @property
    def _held(self) -> list[Tensor]:
        return [held for held in (*self.contexts, self.key_mask) if held is not None]

    @property
    def nbytes(self) -> int:
        """Bytes of both."""
        return self.cache_bytes + self.context_bytes

    def load(self, contexts: LayerContexts) -> None:
        """Copy in the contexts of up to B texts, each of up to Ls tokens."""
        if self.key_mask is not None:
            self.key_mask.zero_()
        for held, context in zip(self.contexts, contexts, strict=True):
            if held is None and context is None:
                continue
            if held is None:
                raise UsageError("a layer that attends to no context got one: these contexts are another network's")
            if context is None or context.key.dtype != held.dtype:
                found = "no context" if context is None else f"a context of {context.key.dtype}"
                raise UsageError(f"a layer got {found}, its weights are {held.dtype}: encode the texts again")
            batch, heads, length, _ = context.key.shape
            held[:batch, :heads, :length] = context.key
            held[:batch, heads:, :length] = context.value
            if self.key_mask is not None:  # every layer attends to the same tokens
                self.key_mask[:batch, :length] = True if context.key_mask is None else context.key_mask

    def take_over(self, other: StepBuffers, length: int) -> None:
        """Continue what smaller buffers hold of `length` positions."""
        for mine, theirs in zip(self._held, other._held, strict=True):
            mine.copy_(theirs)
        for mine, theirs in zip(self.caches, other.caches, strict=True):
            mine[:, :, :, :length] = theirs[:, :, :, :length]

    def take_rows(self, rows: Tensor, before: tuple[int, int], after: tuple[int, int], places: slice) -> None:
        """Row i becomes what row `rows[i]` was, at some places; `before` and `after` are contexts and rows of each."""
        for cache in self.caches:
            moved = cache[: before[0], : before[1], :, places].flatten(0, 1).index_select(0, rows)
            cache[: after[0], : after[1], :, places] = moved.unflatten(0, after)

    def take_contexts(self, contexts: Tensor) -> None:
        """Context i becomes what context `contexts[i]` was."""
        for held in self._held:
            held[: contexts.shape[0]] = held.index_select(0, contexts)


class StepSource(Protocol):
    """Hands out buffers whose `run` is ready, and takes them back."""

    @property
    def decoder(self) -> StepDecoder:
        """The decoder."""
        ...

    @property
    def context_length(self) -> int | None:
        """Tokens of every context, none of which is padding; None: that varies."""
        ...

    def lend(self, shape: StepShape) -> StepBuffers:
        """Buffers of a shape, for one state alone."""
        ...

    def give_back(self, buffers: StepBuffers) -> None:
        """They are free again."""
        ...


class StaticState(DecoderState):
    """A `DecoderState` whose every step has the same shapes: tokens are read one by one, finished rows stay.

    Args:
        steps: where the compiled steps come from.
        contexts: what `project_context` gave for B contexts.
        rows_per_context: n at the start.
        most_rows: the largest n that `reorder` will ask for.
        max_length: most tokens of a row, prompt included.
        window: self-attention sees only so many last tokens (and the cache holds few more); None: all.
        reads_alignment: keep the attention to the context; see `TranslationState`.

    Attributes:
        steps: for each call of `logits` so far the weights `[R, Ls]` of its last token, where they are read.

    Raises:
        UsageError: as `DecoderState`.
    """

    def __init__(
        self,
        source: StepSource,
        contexts: LayerContexts,
        *,
        rows_per_context: int = 1,
        most_rows: int = 1,
        max_length: int,
        window: int | None = None,
        reads_alignment: bool = False,
    ) -> None:
        if window is not None and window < 1:
            raise UsageError(f"window is {window}, it must be at least 1")
        super().__init__(
            source.decoder, contexts, rows_per_context=rows_per_context, max_length=max_length, window=window
        )
        self.steps: list[Tensor] = []
        self._source, self._max_length = source, max_length
        self._most_places = max_length if window is None else min(window, max_length)
        self._length = 0
        longest = max(context.length for context in contexts if context is not None)
        is_padded = any(context is not None and context.key_mask is not None for context in contexts)
        is_masked = is_padded or longest != source.context_length
        shape = StepShape(
            bucket(self.batch_size),
            max(rows_per_context, most_rows),
            bucket(longest, SHORTEST_SOURCE) if is_masked else longest,
            SMALLEST_CAPACITY,
            reads_alignment,
            is_masked,
        )
        buffers = self._take(shape)
        buffers.load(contexts)
        self.stop_every = STOP_EVERY[buffers.ids.device.type]
        self._contexts = ()  # the buffers have them

    def _new_caches(self, max_length: int, window: int | None) -> Iterator[KVCache]:
        return iter(())

    def _take(self, shape: StepShape) -> StepBuffers:
        buffers = self._source.lend(shape)
        self._buffers = buffers
        # Without a window nothing has left the ring, which is never smaller than what was read.
        buffers.window.fill_(min(self._most_places, shape.capacity))
        self._peak = max(self._peak, buffers.cache_bytes)
        # A state that is dropped, a stream that is never read to its end too, frees its buffers.
        self._release = weakref.finalize(self, self._source.give_back, buffers)
        self._release.atexit = False
        return buffers

    @property
    def length(self) -> int:
        """Tokens read so far per row."""
        return self._length

    @property
    def context_bytes(self) -> int:
        """Bytes of the padded copy of the contexts."""
        return self._buffers.context_bytes

    @property
    def peak_cache_bytes(self) -> int:
        """Bytes of the self-attention caches' storage when it was largest, padding included."""
        return self._peak

    def logits(self, input_ids: Tensor) -> Tensor:
        """As `DecoderState.logits`; the result is good until the next call."""
        self._check_rows(input_ids)
        check_unwatched()
        if self._length + input_ids.shape[1] > self._max_length:
            raise UsageError(
                f"{self._length} tokens are read and {input_ids.shape[1]} more asked for, max_length is"
                f" {self._max_length}; start with a larger max_length"
            )
        logits = weights = None
        for token in input_ids.unbind(dim=1):
            logits, weights = self._step(token)
        assert logits is not None
        if weights is not None:
            self.steps.append(self._live(weights).clone())
        return self._live(logits)

    def _step(self, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        buffers = self._buffers
        if self._length == buffers.shape.capacity < self._most_places:
            buffers = self._grown()
        buffers.ids[: self.batch_size, : self.rows_per_context] = tokens.view(self.batch_size, -1)
        buffers.position.fill_(self._length)
        self._length += 1
        return buffers.run()

    def _grown(self) -> StepBuffers:
        smaller, release = self._buffers, self._release
        larger = self._take(replace(smaller.shape, capacity=2 * smaller.shape.capacity))
        larger.take_over(smaller, self._length)
        release()
        return larger

    def _live(self, rows: Tensor) -> Tensor:
        """Of all rows `[B * n, ...]` those that are in use."""
        shape = self._buffers.shape
        if self.rows_per_context == shape.rows:
            return rows[: self.num_rows]
        return rows.unflatten(0, (shape.batch, shape.rows))[: self.batch_size, : self.rows_per_context].flatten(0, 1)

    def _take_rows(self, rows: Tensor, per_context: int, unchanged: int = 0) -> None:
        shape = self._buffers.shape
        if per_context > shape.rows:
            raise UsageError(f"{per_context} rows per context were asked for, this state was started for {shape.rows}")
        is_whole = self._length <= shape.capacity
        places = slice(unchanged if per_context == self.rows_per_context else 0, self._length)
        self._buffers.take_rows(
            rows,
            (self.batch_size, self.rows_per_context),
            (rows.shape[0] // per_context, per_context),
            places if is_whole else slice(None),  # the ring has turned: any place may hold any position
        )

    def _take_contexts(self, contexts: Tensor) -> None:
        self._buffers.take_contexts(contexts)
