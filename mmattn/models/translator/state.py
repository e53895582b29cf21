"""A translation being decoded: a decoder state that can also keep where each token looked."""

from __future__ import annotations

from torch import Tensor

from mmattn.models.decoding import DecoderState, LayerContexts, StepDecoder
from mmattn.models.translator.alignment import AlignmentReader


class TranslationState(DecoderState):
    """A `DecoderState`, with the attention weights of every step when an `alignment` reader is given.

    Attributes:
        steps: for each call of `logits` so far the weights `[R, Ls]` of its last token, R as it was in that call.
    """

    def __init__(
        self,
        decoder: StepDecoder,
        contexts: LayerContexts,
        *,
        rows_per_context: int = 1,
        max_length: int,
        window: int | None = None,
        alignment: AlignmentReader | None = None,
    ) -> None:
        super().__init__(decoder, contexts, rows_per_context=rows_per_context, max_length=max_length, window=window)
        self._alignment = alignment
        self.steps: list[Tensor] = []

    def logits(self, input_ids: Tensor) -> Tensor:
        """As in `DecoderState`."""
        if self._alignment is None:
            return super().logits(input_ids)
        with self._alignment.reading():
            scores = super().logits(input_ids)
        weights = self._alignment.take()
        rows, length = input_ids.shape
        self.steps.append(weights.reshape(rows, length, -1)[:, -1])
        return scores
