"""What a decoder offers to the search loops, and what the loops return."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from mmattn.inference.decode.settings import DecodeSettings


class DecoderState(Protocol):
    """One decoding in progress. Its rows lie context by context: row i belongs to context `i // (R / contexts)`.

    R rows, L new tokens, V vocabulary. What is attended to is stored once per context, never per row.
    """

    def logits(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Append `input_ids [R, L]` and return the scores `[R, V]` of the token that follows the last one."""
        ...

    def reorder(self, rows: torch.Tensor, *, unchanged: int = 0) -> None:
        """Keep these rows, in this order; a row may be repeated or dropped, but stays with its context.

        The first `unchanged` tokens are the same in row i and row `rows[i]`, so that what is kept of them may stay.
        """
        ...

    def select_contexts(self, contexts: torch.Tensor) -> None:
        """Keep these contexts, each with all its rows."""
        ...


@dataclass(frozen=True)
class DecodeTask:
    """What to continue, and how; see `decode` for the fields."""

    prompt: torch.Tensor
    settings: DecodeSettings
    texts_per_context: int = 1
    num_forced: int = 0
    with_scores: bool = True
    keep_rows: bool = False
    stop_every: int = 1

    @property
    def base(self) -> int:
        """Tokens of a prompt that do not count as generated."""
        return self.prompt.shape[1] - self.num_forced

    @property
    def max_length(self) -> int:
        """Longest text, prompt included."""
        return self.settings.total_length(self.base)


@dataclass(frozen=True)
class Generated:
    """One decoded text.

    Attributes:
        tokens: the new tokens, without the prompt, with the end token when it was reached.
        score: sum of log-probabilities; for beam search divided by `length ** length_penalty`.
        rows: for each token the decoder row that chose it, counted in the step that chose it, and -1 for a token that
            was forced with the prompt; None unless asked for.
    """

    tokens: list[int]
    score: float
    rows: list[int] | None = None
