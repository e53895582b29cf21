"""Greedy, sampled and beam-searched decoding over any `DecoderState`, equal to transformers' `generate`."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from mmattn.errors import UsageError
from mmattn.inference.decode.beam import beam_search
from mmattn.inference.decode.greedy import greedy, row_steps
from mmattn.inference.decode.logits import likeliest
from mmattn.inference.decode.sample import drawing, sample
from mmattn.inference.decode.settings import DecodeSettings
from mmattn.inference.decode.state import DecoderState, DecodeTask, Generated

__all__ = ["DecodeSettings", "DecodeTask", "DecoderState", "Generated", "decode", "stream"]


@torch.inference_mode()
def decode(
    state: DecoderState,
    prompt: torch.Tensor,
    settings: DecodeSettings,
    *,
    texts_per_context: int = 1,
    num_forced: int = 0,
    generator: torch.Generator | None = None,
    with_scores: bool = True,
    keep_rows: bool = False,
    stop_every: int = 1,
) -> list[list[Generated]]:
    """Continue the prompts `[S, L]`, all of one length, in the way the settings say.

    Args:
        state: a fresh decoder with S rows, `texts_per_context` for each context.
        prompt: text i belongs to context `i // texts_per_context`.
        settings: beams, lengths, penalties; see `DecodeSettings`.
        texts_per_context: prompts that share a context, such as questions about one picture.
        num_forced: so many of the prompt's last tokens count as generated, as a forced first token does in
            transformers: they are part of the results, and of every length.
        generator: source of the draws with `do_sample=True`; torch's global one when None.
        with_scores: False leaves `Generated.score` out where it takes time, without beams: it is NaN.
        keep_rows: fill `Generated.rows`.
        stop_every: look only every so many steps for texts that have ended; looking waits for an accelerator. The
            result is the same, but for draws, which depend on how many rows are left: those want 1.

    Returns:
        For each prompt its `num_return_sequences` results, best first.

    Raises:
        UsageError: when the prompt leaves no room under `max_length`, or something else than a generator.
    """
    _check_generator(generator)
    task = DecodeTask(prompt, settings, texts_per_context, num_forced, with_scores, keep_rows, stop_every)
    if settings.num_beams > 1:
        return beam_search(state, task, generator)
    if settings.do_sample:
        return sample(state, task, generator)
    return greedy(state, task)


def stream(
    state: DecoderState,
    prompt: torch.Tensor,
    settings: DecodeSettings,
    *,
    num_forced: int = 0,
    generator: torch.Generator | None = None,
) -> Iterator[int]:
    """The tokens that continue one prompt `[1, L]`, each as soon as it is chosen, greedily or drawn. See `decode`.

    Raises:
        UsageError: beams, or several results: they are known at the end only.
    """
    if settings.num_beams > 1 or settings.num_return_sequences > 1:
        raise UsageError("streaming gives tokens as they are chosen: use num_beams=1 and num_return_sequences=1")
    _check_generator(generator)
    choose = drawing(generator, num_forced) if settings.do_sample else likeliest
    steps = row_steps(state, DecodeTask(prompt, settings, 1, num_forced, with_scores=False), choose)
    yield from prompt[0, prompt.shape[1] - num_forced :].tolist()
    while True:
        # Not around the yield: the caller's own code would run in inference mode.
        with torch.inference_mode():
            tokens = next(steps, None)
        if tokens is None:
            return
        yield int(tokens[0])


def _check_generator(generator: torch.Generator | None) -> None:
    if generator is not None and not isinstance(generator, torch.Generator):
        raise UsageError(
            f"generator is {generator!r}; give a torch.Generator, such as torch.Generator().manual_seed(0)"
        )
