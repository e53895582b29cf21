"""A text being decoded: the projected context, and the self-attention caches that grow with the text.

B contexts (pictures, source sentences), R = B * n rows, row i belongs to context i // n; L tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from mmattn.errors import UsageError
from mmattn.nn import CrossAttention, SelfAttention, TransformerLayer
from mmattn.ops.cache import ContextKV, KVCache
from mmattn.ops.static_cache import StaticKVCache

LayerContexts = tuple[ContextKV | None, ...]
"""Projected keys and values of a context, an entry per layer; None for a layer that doesn't attend to it."""

_INITIAL_LENGTH = 32  # most captions, answers and sentences fit without a second allocation


class StepDecoder(Protocol):
    """A causal text network that attends to a context, as a decoder state runs it."""

    @property
    def layers(self) -> nn.ModuleList:
        """Its `TransformerLayer`s."""
        ...

    @property
    def context_attentions(self) -> Sequence[CrossAttention | None]:
        """For each layer the attention that reads the context; None: it reads none."""
        ...

    @property
    def max_positions(self) -> int:
        """Most tokens of a text."""
        ...

    def __call__(
        self,
        input_ids: Tensor,
        contexts: LayerContexts | None = None,
        *,
        caches: Sequence[KVCache] | Sequence[StaticKVCache] | None = None,
        attn_mask: Tensor | None = None,
    ) -> Tensor:
        """Hidden states `[R, L, C]` of tokens that continue what is cached; `attn_mask` is the self-attention's, bool
        `[L, Lk]`, besides what causality says."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states `[..., C]` to scores `[..., V]`."""
        ...


def weight_of(layer: TransformerLayer) -> Tensor:
    """A weight that says where the layer is and in which dtype: a norm's, since the Linears may be quantised."""
    return next(layer.ffn_norm.parameters())


class DecoderState:
    """What decoding carries from token to token. The caller holds it; the network keeps nothing.

    Contexts are never copied per row: n beams or samples of a picture read the same keys and values, and `reorder`
    moves the self-attention caches only.

    Args:
        decoder: the text decoder.
        contexts: what `project_context` gave for B contexts.
        rows_per_context: n.
        max_length: most tokens of a row, prompt included.
        window: self-attention sees only so many last tokens (and the cache holds no more); None: all.

    Attributes:
        stop_every: how often to look for texts that have ended, in steps.

    Raises:
        UsageError: `max_length` beyond the model's positions, or contexts that no layer attends to.
    """

    stop_every = 1

    def __init__(
        self,
        decoder: StepDecoder,
        contexts: LayerContexts,
        *,
        rows_per_context: int = 1,
        max_length: int,
        window: int | None = None,
    ) -> None:
        if max_length > decoder.max_positions:
            raise UsageError(
                f"max_length {max_length} is more than this model's {decoder.max_positions} positions:"
                " ask for fewer new tokens or shorten the prompt"
            )
        self._decoder = decoder
        self._contexts = contexts
        self._batch_size = next((context.batch_size for context in contexts if context is not None), 0)
        if not self._batch_size:
            raise UsageError("no layer has a context to attend to: pass what project_context() returns")
        self._rows_per_context = rows_per_context
        self._caches = list(self._new_caches(max_length, window))
        self._peak = 0

    def _new_caches(self, max_length: int, window: int | None) -> Iterator[KVCache]:
        for layer in cast("Sequence[TransformerLayer]", self._decoder.layers):
            attention = cast(SelfAttention, layer.self_attn)
            weight = weight_of(layer)
            autocast = torch.is_autocast_enabled(weight.device.type)
            yield KVCache(
                self.num_rows,
                attention.num_kv_heads,
                attention.head_dim,
                max_length=max_length,
                dtype=torch.get_autocast_dtype(weight.device.type) if autocast else weight.dtype,
                device=weight.device,
                initial_length=min(_INITIAL_LENGTH, max_length),
                window=window,
            )

    @property
    def batch_size(self) -> int:
        """B."""
        return self._batch_size

    @property
    def rows_per_context(self) -> int:
        """n."""
        return self._rows_per_context

    @property
    def num_rows(self) -> int:
        """R = B * n."""
        return self._batch_size * self._rows_per_context

    @property
    def length(self) -> int:
        """Tokens read so far per row."""
        return self._caches[0].position

    @property
    def context_bytes(self) -> int:
        """Bytes of the contexts' keys, values and masks."""
        return sum(context.nbytes for context in self._contexts if context is not None)

    @property
    def peak_cache_bytes(self) -> int:
        """Bytes of the self-attention caches' storage when it was largest."""
        return max(self._peak, sum(cache.nbytes for cache in self._caches))

    def logits(self, input_ids: Tensor) -> Tensor:
        """Append tokens to every row; the vocabulary head runs on the last position only.

        Args:
            input_ids: `[R, L]`: the prompt first, then usually L = 1. Rows of a call have equal length.

        Returns:
            `[R, V]`, the scores of the token that comes next.

        Raises:
            UsageError: a number of rows that is not R, or no room left for L more tokens.
        """
        self._check_rows(input_ids)
        hidden = self._decoder(input_ids, self._contexts, caches=self._caches)
        return self._decoder.logits(hidden[:, -1])

    def _check_rows(self, input_ids: Tensor) -> None:
        if input_ids.shape[0] != self.num_rows:
            raise UsageError(
                f"input_ids has {input_ids.shape[0]} rows, this state has {self.num_rows}"
                f" ({self._batch_size} contexts with {self._rows_per_context} rows each)"
            )

    def reorder(self, rows: Tensor, *, unchanged: int = 0) -> None:
        """Continue from other rows: row i becomes what row `rows[i]` was. Contexts stay where they are.

        Args:
            rows: int64 `[B * m]`, entries i * m .. (i + 1) * m - 1 taken from context i's rows; m may differ from n
                (`rows_per_context` becomes m). Not checked against their pictures: that would cost a device sync.
            unchanged: so many first tokens are the same in row i and row `rows[i]`; what is cached of them stays.

        Raises:
            UsageError: a number of rows that is no multiple of B.
        """
        if rows.shape[0] % self._batch_size:
            raise UsageError(f"{rows.shape[0]} rows cannot be shared evenly by {self._batch_size} contexts")
        per_context = rows.shape[0] // self._batch_size
        self._take_rows(rows, per_context, unchanged)
        self._rows_per_context = per_context

    def select_contexts(self, contexts: Tensor) -> None:
        """Keep some contexts, each with all its rows, in the order given.

        Args:
            contexts: int64 `[B']`, numbers of the contexts to keep.
        """
        offsets = torch.arange(self._rows_per_context, device=contexts.device)
        self._take_rows((contexts[:, None] * self._rows_per_context + offsets).flatten(), self._rows_per_context)
        self._take_contexts(contexts)
        self._batch_size = contexts.shape[0]

    def _take_contexts(self, contexts: Tensor) -> None:
        self._contexts = tuple(None if kept is None else kept.select(contexts) for kept in self._contexts)

    def _take_rows(self, rows: Tensor, per_context: int, unchanged: int = 0) -> None:
        self._peak = self.peak_cache_bytes
        for cache in self._caches:
            cache.reorder(rows, unchanged=unchanged)
