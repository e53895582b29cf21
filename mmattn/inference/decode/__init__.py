"""Greedy, sampled and beam-searched decoding over any `DecoderState`, equal to transformers' `generate`."""

from __future__ import annotations

import torch

from mmattn.inference.decode.beam import beam_search
from mmattn.inference.decode.greedy import greedy
from mmattn.inference.decode.sample import sample
from mmattn.inference.decode.settings import DecodeSettings
from mmattn.inference.decode.state import DecoderState, Generated

__all__ = ["DecodeSettings", "DecoderState", "Generated", "beam_search", "decode", "greedy", "sample"]


@torch.inference_mode()
def decode(
    state: DecoderState,
    prompt: torch.Tensor,
    settings: DecodeSettings,
    *,
    texts_per_context: int = 1,
    generator: torch.Generator | None = None,
) -> list[list[Generated]]:
    """Continue the prompts `[S, L]`, all of one length, in the way the settings say.

    Args:
        state: a fresh decoder with S rows, `texts_per_context` for each context.
        prompt: text i belongs to context `i // texts_per_context`.
        settings: beams, lengths, penalties; see `DecodeSettings`.
        texts_per_context: prompts that share a context, such as questions about one picture.
        generator: source of the draws with `do_sample=True`; torch's global one when None.

    Returns:
        For each prompt its `num_return_sequences` results, best first.

    Raises:
        UsageError: when the prompt leaves no room under `max_length`.
    """
    arguments = {"texts_per_context": texts_per_context}
    if settings.num_beams > 1:
        return beam_search(state, prompt, settings, generator=generator, **arguments)
    if settings.do_sample:
        return sample(state, prompt, settings, generator=generator, **arguments)
    return greedy(state, prompt, settings, **arguments)
