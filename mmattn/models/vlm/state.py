"""A text being decoded: the projected context, and the self-attention caches that grow with the text.

B contexts (pictures, or questions on them), R = B * n rows, row i belongs to context i // n; L tokens, V vocabulary.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from mmattn.errors import UsageError
from mmattn.models.vlm.text import LayerContexts, TextDecoder
from mmattn.nn import SelfAttention, TransformerLayer
from mmattn.ops.cache import KVCache

_INITIAL_LENGTH = 32  # most captions and answers fit without a second allocation


class DecoderState:
    """What decoding carries from token to token. The caller holds it; the network keeps nothing.

    Contexts are never copied per row: n beams or samples of a picture read the same keys and values, and `reorder`
    moves the self-attention caches only.

    Args:
        decoder: the text decoder.
        contexts: what `project_context` gave for B contexts.
        rows_per_context: n.
        max_length: most tokens of a row, prompt included.

    Raises:
        UsageError: `max_length` beyond the model's positions, or contexts that no layer attends to.
    """

    def __init__(
        self, decoder: TextDecoder, contexts: LayerContexts, *, rows_per_context: int = 1, max_length: int
    ) -> None:
        if max_length > decoder.config.max_positions:
            raise UsageError(
                f"max_length {max_length} is more than this model's {decoder.config.max_positions} positions:"
                " ask for fewer new tokens or shorten the prompt"
            )
        self._decoder = decoder
        self._contexts = contexts
        self._batch_size = next((context.batch_size for context in contexts if context is not None), 0)
        if not self._batch_size:
            raise UsageError("no layer has a context to attend to: pass what project_context() returns")
        self._rows_per_context = rows_per_context
        self._caches = [self._new_cache(cast(TransformerLayer, layer), max_length) for layer in decoder.body.layers]

    def _new_cache(self, layer: TransformerLayer, max_length: int) -> KVCache:
        attention = cast(SelfAttention, layer.self_attn)
        weight = self._decoder.body.embedding.words.weight
        device_type = weight.device.type
        autocast = torch.is_autocast_enabled(device_type)
        return KVCache(
            self.num_rows,
            attention.num_kv_heads,
            attention.head_dim,
            max_length=max_length,
            dtype=torch.get_autocast_dtype(device_type) if autocast else weight.dtype,
            device=weight.device,
            initial_length=min(_INITIAL_LENGTH, max_length),
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
        """Tokens cached per row."""
        return self._caches[0].length

    def logits(self, input_ids: Tensor) -> Tensor:
        """Append tokens to every row; the vocabulary head runs on the last position only.

        Args:
            input_ids: `[R, L]`: the prompt first, then usually L = 1. Rows of a call have equal length.

        Returns:
            `[R, V]`, the scores of the token that comes next.

        Raises:
            UsageError: a number of rows that is not R, or no room left for L more tokens.
        """
        if input_ids.shape[0] != self.num_rows:
            raise UsageError(
                f"input_ids has {input_ids.shape[0]} rows, this state has {self.num_rows}"
                f" ({self._batch_size} contexts with {self._rows_per_context} rows each)"
            )
        hidden = self._decoder(input_ids, self._contexts, caches=self._caches)
        return self._decoder.logits(hidden[:, -1])

    def reorder(self, rows: Tensor) -> None:
        """Continue from other rows: row i becomes what row `rows[i]` was. Contexts stay where they are.

        Args:
            rows: int64 `[B * m]`, entries i * m .. (i + 1) * m - 1 taken from context i's rows; m may differ from n
                (`rows_per_context` becomes m). Not checked against their pictures: that would cost a device sync.

        Raises:
            UsageError: a number of rows that is no multiple of B.
        """
        if rows.shape[0] % self._batch_size:
            raise UsageError(f"{rows.shape[0]} rows cannot be shared evenly by {self._batch_size} contexts")
        self._take_rows(rows)
        self._rows_per_context = rows.shape[0] // self._batch_size

    def select_contexts(self, contexts: Tensor) -> None:
        """Keep some contexts, each with all its rows, in the order given.

        Args:
            contexts: int64 `[B']`, numbers of the contexts to keep.
        """
        offsets = torch.arange(self._rows_per_context, device=contexts.device)
        self._take_rows((contexts[:, None] * self._rows_per_context + offsets).flatten())
        self._contexts = tuple(None if kept is None else kept.select(contexts) for kept in self._contexts)
        self._batch_size = contexts.shape[0]

    def _take_rows(self, rows: Tensor) -> None:
        for cache in self._caches:
            cache.reorder(rows)
