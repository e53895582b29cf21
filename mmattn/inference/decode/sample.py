"""Sampling from the scores after temperature, top-k, top-p and the like."""

from __future__ import annotations

import torch

from mmattn.inference.decode.greedy import decode_rows
from mmattn.inference.decode.settings import DecodeSettings
from mmattn.inference.decode.state import DecoderState, Generated


def sample(
    state: DecoderState,
    prompt: torch.Tensor,
    settings: DecodeSettings,
    *,
    texts_per_context: int = 1,
    generator: torch.Generator | None = None,
) -> list[list[Generated]]:
    """Draw `num_return_sequences` texts for each prompt. See `decode` for arguments and result."""

    def draw(scores: torch.Tensor) -> torch.Tensor:
        return torch.multinomial(scores.softmax(dim=-1), 1, generator=generator)[:, 0]

    copies = settings.num_return_sequences
    return decode_rows(state, prompt, settings, draw, texts_per_context=texts_per_context, copies=copies)
