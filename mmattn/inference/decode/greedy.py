"""One token after another, row by row: the loop that greedy decoding and sampling share."""

from __future__ import annotations

from collections.abc import Callable

import torch

from mmattn.inference.decode.logits import build_processors
from mmattn.inference.decode.settings import DecodeSettings
from mmattn.inference.decode.state import DecoderState, Generated
from mmattn.inference.decode.stopping import Roster, cut, ends, shrink


def greedy(
    state: DecoderState, prompt: torch.Tensor, settings: DecodeSettings, *, texts_per_context: int = 1
) -> list[list[Generated]]:
    """The likeliest token at every step. See `decode` for arguments and result."""
    return decode_rows(state, prompt, settings, _likeliest, texts_per_context=texts_per_context)


def _likeliest(scores: torch.Tensor) -> torch.Tensor:
    return scores.argmax(dim=-1)


def decode_rows(
    state: DecoderState,
    prompt: torch.Tensor,
    settings: DecodeSettings,
    choose: Callable[[torch.Tensor], torch.Tensor],
    *,
    texts_per_context: int = 1,
    copies: int = 1,
) -> list[list[Generated]]:
    """Decode `copies` texts for each prompt, with `choose(scores [R, V]) -> tokens [R]`.

    The prompt is read once; its copies part ways at the first new token.
    """
    eos_ids = settings.eos_ids
    num_texts, start = prompt.shape
    max_length = settings.total_length(start)
    processors = build_processors(settings, start, prompt.device)
    logits = state.logits(prompt)
    if copies > 1:
        rows = torch.arange(num_texts, device=prompt.device).repeat_interleave(copies)
        state.reorder(rows)
        prompt, logits = prompt[rows], logits[rows]
    num_rows = num_texts * copies
    roster = Roster(num_rows, texts_per_context * copies)
    sequences = prompt.new_empty(num_rows, max_length)
    sequences[:, :start] = prompt
    totals = torch.zeros(num_rows, device=prompt.device)
    is_done = torch.zeros(num_rows, dtype=torch.bool, device=prompt.device)
    results: dict[int, Generated] = {}

    def collect(slots: list[int], length: int) -> None:
        for slot in slots:
            tokens = cut(sequences[slot, start:length].tolist(), eos_ids)
            results.setdefault(roster.texts[slot], Generated(tokens, totals[slot].item()))

    for length in range(start, max_length):
        scores = processors(sequences[:, :length], logits.float())  # type: ignore[arg-type]
        tokens = choose(scores)
        sequences[:, length] = tokens
        log_probs = scores.gather(1, tokens[:, None])[:, 0] - scores.logsumexp(dim=-1)
        totals = torch.where(is_done, totals, totals + log_probs)
        if length + 1 == max_length:
            break
        if eos_ids:
            is_done |= ends(tokens, eos_ids)
            flags = is_done.tolist()
            if any(flags):
                collect([slot for slot, done in enumerate(flags) if done], length + 1)
            if all(flags):
                return _in_order(results, copies)
            num_contexts = len(flags) // roster.per_context
            kept = roster.retire(flags)
            if kept is not None:
                rows = tokens.new_tensor(kept.slots)
                shrink(state, rows, kept.contexts, num_contexts, len(flags))
                tokens, sequences, totals, is_done = tokens[rows], sequences[rows], totals[rows], is_done[rows]
        logits = state.logits(tokens[:, None])
    collect(list(range(len(roster.texts))), max_length)
    return _in_order(results, copies)


def _in_order(results: dict[int, Generated], copies: int) -> list[list[Generated]]:
    ordered = [results[text] for text in range(len(results))]
    return [ordered[first : first + copies] for first in range(0, len(ordered), copies)]
