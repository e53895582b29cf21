"""Sampling from the scores after temperature, top-k, top-p and the like."""

from __future__ import annotations

from collections.abc import Callable

import torch

from mmattn.inference.decode.greedy import decode_rows
from mmattn.inference.decode.state import DecoderState, DecodeTask, Generated


def sample(state: DecoderState, task: DecodeTask, generator: torch.Generator | None = None) -> list[list[Generated]]:
    """Draw `num_return_sequences` texts for each prompt. See `decode` for arguments and result."""
    choose = drawing(generator, task.num_forced)
    return decode_rows(state, task, choose, copies=task.settings.num_return_sequences)


def drawing(generator: torch.Generator | None, num_forced: int = 0) -> Callable[[torch.Tensor], torch.Tensor]:
    """Scores `[R, V]` to tokens `[R]`, drawn by their probability; the first call comes after `num_forced` tokens."""
    passed_over = num_forced

    def draw(scores: torch.Tensor) -> torch.Tensor:
        nonlocal passed_over
        pass_over(scores, passed_over, generator)
        passed_over = 0
        return torch.multinomial(scores.softmax(dim=-1), 1, generator=generator)[:, 0]

    return draw


def pass_over(scores: torch.Tensor, count: int, generator: torch.Generator | None) -> None:
    """Take from the generator what `count` draws by such scores would: transformers draws forced tokens, too."""
    for _ in range(count):
        torch.empty_like(scores).exponential_(generator=generator)
