"""Sampling from the scores after temperature, top-k, top-p and the like."""

from __future__ import annotations

from collections.abc import Callable

import torch

from mmattn.inference.decode.greedy import decode_rows
from mmattn.inference.decode.state import DecoderState, DecodeTask, Generated


def sample(state: DecoderState, task: DecodeTask, generator: torch.Generator | None = None) -> list[list[Generated]]:
    """Draw `num_return_sequences` texts for each prompt. See `decode` for arguments and result."""
    return decode_rows(state, task, drawing(generator), copies=task.settings.num_return_sequences)


def drawing(generator: torch.Generator | None) -> Callable[[torch.Tensor], torch.Tensor]:
    """Scores `[R, V]` to tokens `[R]`, drawn by their probability."""

    def draw(scores: torch.Tensor) -> torch.Tensor:
        return torch.multinomial(scores.softmax(dim=-1), 1, generator=generator)[:, 0]

    return draw
