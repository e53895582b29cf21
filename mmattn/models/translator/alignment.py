"""Which source token a target token comes from, read from the decoder's cross-attention.

B sources of Ls tokens, R = B * n rows of L target tokens, H heads, D head_dim. The weights are recomputed from the
layer's queries and keys for the heads that are wanted; the layer itself keeps its fused backend.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mmattn.errors import UsageError
from mmattn.nn import CrossAttention
from mmattn.ops.attention import attention
from mmattn.ops.observe import AttentionCall, observing


class AlignmentReader:
    """Reads one cross-attention's weights while the network runs, averaged over heads.

    Args:
        layer: the cross-attention.
        heads: those to average; None: all.
    """

    def __init__(self, layer: CrossAttention, heads: Sequence[int] | None = None) -> None:
        self._layer = layer
        self._heads = None if heads is None else list(heads)
        self._last: Tensor | None = None

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Within the block, the layer's call is read (eagerly: a compiled graph is not seen)."""
        self._last = None
        with observing(self._see):
            yield

    def take(self) -> Tensor:
        """The weights of the last call, `[B, n * L, Ls]`: the n rows of a source one after the other.

        Raises:
            UsageError: the layer did not run.
        """
        if self._last is None:
            raise UsageError("no cross-attention was seen: alignments cannot be read inside a compiled graph")
        weights, self._last = self._last, None
        return weights

    def weights(self, query: Tensor, key: Tensor, key_mask: Tensor | None) -> Tensor:
        """`[B, n * L, Ls]` of the layer's queries `[B, H, n * L, D]` and keys `[B, G, Ls, D]`."""
        if self._heads is not None:
            group = query.shape[1] // key.shape[1]
            query = query[:, self._heads]
            key = key[:, [head // group for head in self._heads]]
        # The values are of no interest, the keys are at hand.
        _, weights = attention(
            query, key, key, key_mask=key_mask, scale=self._layer.scale, backend="eager", return_weights=True
        )
        return weights.mean(dim=1)

    def _see(self, call: AttentionCall) -> None:
        if call.caller is self._layer:
            self._last = self.weights(call.query, call.key, call.key_mask)


def alignment_loss(weights: Tensor, gold: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy between gold alignments and attention weights (arXiv 1909.02074, equation 5).

    Args:
        weights: `[R, L, Ls]`.
        gold: `[R, L, Ls]`, rows that sum to 1, or to 0 where nothing is known.

    Returns:
        The sum over the rows that are aligned, and their number (int64).
    """
    tiny = torch.finfo(torch.float32).tiny
    total = -(gold * weights.float().clamp_min(tiny).log()).sum()
    return total, (gold.sum(dim=-1) > 0).sum()
