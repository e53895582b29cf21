"""One token after another, row by row: the loop that greedy decoding, sampling and streaming share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch

from mmattn.inference.decode.logits import build_processors, likeliest
from mmattn.inference.decode.state import DecoderState, DecodeTask, Generated
from mmattn.inference.decode.stopping import Roster, cut, ends, shrink

Choose = Callable[[torch.Tensor], torch.Tensor]
"""Scores `[R, V]` to tokens `[R]`."""


def greedy(state: DecoderState, task: DecodeTask) -> list[list[Generated]]:
    """The likeliest token at every step. See `decode` for arguments and result."""
    return decode_rows(state, task, likeliest)


def decode_rows(state: DecoderState, task: DecodeTask, choose: Choose, *, copies: int = 1) -> list[list[Generated]]:
    """Decode `copies` texts for each prompt.

    The prompt is read once; its copies part ways at the first new token.
    """
    results: dict[int, Generated] = {}
    for _ in row_steps(state, task, choose, copies=copies, results=results):
        pass
    ordered = [results[text] for text in range(len(results))]
    return [ordered[first : first + copies] for first in range(0, len(ordered), copies)]


def row_steps(
    state: DecoderState,
    task: DecodeTask,
    choose: Choose,
    *,
    copies: int = 1,
    results: dict[int, Generated] | None = None,
) -> Iterator[torch.Tensor]:
    """Decode step by step: yields the tokens `[R]` chosen for the rows still at work, and fills `results` by text."""
    prompt, eos_ids = task.prompt, task.settings.eos_ids
    num_texts, start = prompt.shape
    max_length = task.max_length
    processors = build_processors(task.settings, task.base, prompt.device, num_forced=task.num_forced)
    rows_kept = _Rows(task, num_texts * copies, copies, {} if results is None else results)
    if start >= max_length:
        rows_kept.collect(range(num_texts * copies), start)
        return
    logits = state.logits(prompt)
    if copies > 1:
        rows = torch.arange(num_texts, device=prompt.device).repeat_interleave(copies)
        state.reorder(rows)
        logits = logits[rows]
    for length in range(start, max_length):
        scores = processors(rows_kept.sequences[:, :length], logits.float())  # type: ignore[arg-type]
        tokens = choose(scores)
        rows_kept.append(length, tokens, scores)
        yield tokens
        if length + 1 == max_length:
            break
        if eos_ids:
            rows_kept.note_ends(tokens)
            is_looked_at = (length + 1 - start) % task.stop_every == 0
            flags = rows_kept.is_done.tolist() if is_looked_at else [False] * len(tokens)
            if any(flags):
                rows_kept.collect([slot for slot, done in enumerate(flags) if done], length + 1)
            if all(flags):
                return
            tokens = rows_kept.leave(state, flags, tokens)
        logits = state.logits(tokens[:, None])
    rows_kept.collect(range(len(rows_kept.roster.texts)), max_length)


class _Rows:
    """The rows of a running decoder: their tokens, scores, and which text each works on."""

    def __init__(self, task: DecodeTask, num_rows: int, copies: int, results: dict[int, Generated]) -> None:
        self.task, self.results, self.copies = task, results, copies
        self.roster = Roster(num_rows, task.texts_per_context * copies)
        prompt, device = task.prompt, task.prompt.device
        self.sequences = prompt.new_empty(num_rows, max(task.max_length, prompt.shape[1]))
        self.sequences[:, : prompt.shape[1]] = prompt.repeat_interleave(copies, dim=0)
        self.totals = torch.full((num_rows,), 0.0 if task.with_scores else math.nan, device=device)
        self.is_done = torch.zeros(num_rows, dtype=torch.bool, device=device)
        self.rows = torch.full_like(self.sequences, -1) if task.keep_rows else None

    def append(self, length: int, tokens: torch.Tensor, scores: torch.Tensor) -> None:
        """Note the tokens chosen at a place, given the scores `[R, V]` that they were chosen by."""
        self.sequences[:, length] = tokens
        if self.rows is not None:
            # The first scores come from one row a prompt, which only then is copied.
            shared = self.copies if length == self.task.prompt.shape[1] else 1
            self.rows[:, length] = torch.arange(len(tokens), device=tokens.device) // shared
        if not self.task.with_scores:
            return
        log_probs = scores.gather(1, tokens[:, None])[:, 0] - scores.logsumexp(dim=-1)
        self.totals = torch.where(self.is_done, self.totals, self.totals + log_probs)

    def note_ends(self, tokens: torch.Tensor) -> None:
        """Keep `is_done`, which rows have reached an end token by now."""
        self.is_done |= ends(tokens, self.task.settings.eos_ids)

    def collect(self, slots: Iterator[int] | range | list[int], length: int) -> None:
        """Put the texts of these slots, ended at `length`, into the results."""
        base = self.task.base
        for slot in slots:
            tokens = cut(self.sequences[slot, base:length].tolist(), self.task.settings.eos_ids)
            rows = None if self.rows is None else self.rows[slot, base : base + len(tokens)].tolist()
            self.results.setdefault(self.roster.texts[slot], Generated(tokens, self.totals[slot].item(), rows))

    def leave(self, state: DecoderState, flags: list[bool], tokens: torch.Tensor) -> torch.Tensor:
        """Let finished texts leave the decoder; returns the tokens `[R]` of the rows that stay."""
        num_contexts = len(flags) // self.roster.per_context
        kept = self.roster.retire(flags)
        if kept is None:
            return tokens
        rows = tokens.new_tensor(kept.slots)
        shrink(state, rows, kept.contexts, num_contexts, len(flags))
        self.sequences, self.totals, self.is_done = self.sequences[rows], self.totals[rows], self.is_done[rows]
        if self.rows is not None:
            self.rows = self.rows[rows]
        return tokens[rows]
