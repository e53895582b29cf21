"""What a decoder offers to the search loops, and what the loops return."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch


class DecoderState(Protocol):
    """One decoding in progress. Its rows lie context by context: row i belongs to context `i // (R / contexts)`.

    R rows, L new tokens, V vocabulary. What is attended to is stored once per context, never per row.
    """

    def logits(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Append `input_ids [R, L]` and return the scores `[R, V]` of the token that follows the last one."""
        ...

    def reorder(self, rows: torch.Tensor) -> None:
        """Keep these rows, in this order; a row may be repeated or dropped, but stays with its context."""
        ...

    def select_contexts(self, contexts: torch.Tensor) -> None:
        """Keep these contexts, each with all its rows."""
        ...


@dataclass(frozen=True)
class Generated:
    """One decoded text.

    Attributes:
        tokens: the new tokens, without the prompt, with the end token when it was reached.
        score: sum of log-probabilities; for beam search divided by `length ** length_penalty`.
    """

    tokens: list[int]
    score: float
