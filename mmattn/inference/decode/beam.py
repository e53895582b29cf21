"""Beam search, step for step as transformers' `generate` does it, with the context shared by the beams.

A text keeps two lists of `num_beams` hypotheses: running ones, which may grow, and finished ones. At each step the best
`(eos tokens + 1) * num_beams` continuations of the running ones are taken; those among the best `num_beams` that end
compete with the finished ones by `score / length ** length_penalty`, and the best that do not end run on.
S texts, N beams, V vocabulary, T longest length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from mmattn.inference.decode.logits import Scorer
from mmattn.inference.decode.sample import pass_over
from mmattn.inference.decode.settings import DecodeSettings
from mmattn.inference.decode.state import DecoderState, DecodeTask, Generated
from mmattn.inference.decode.stopping import Roster, cut, ends, shrink

# What transformers adds to the score of a hypothesis that must not be chosen; finite, so that it can be compared.
_NEVER = -1.0e9


@dataclass
class _Beams:
    """The hypotheses of all texts still in the decoder.

    Attributes:
        running: tokens `[S, N, T]`, prompt included; `running_scores [S, N]` their summed log-probabilities.
        finished: tokens `[S, N, T]`; `finished_scores [S, N]` with the length penalty applied.
        is_finished: `[S, N]`, False where the place in `finished` is still empty.
        can_improve: `[S, 1]`, False once no running hypothesis is expected to beat the worst finished one.
        running_rows: `[S, N, T]`, the decoder row that chose each token, -1 in the prompt; likewise `finished_rows`.
            None unless asked for.
    """

    running: torch.Tensor
    running_scores: torch.Tensor
    finished: torch.Tensor
    finished_scores: torch.Tensor
    is_finished: torch.Tensor
    can_improve: torch.Tensor
    running_rows: torch.Tensor | None = None
    finished_rows: torch.Tensor | None = None

    @classmethod
    def start(cls, task: DecodeTask, fill: int) -> _Beams:
        prompt, num_beams = task.prompt, task.settings.num_beams
        num_texts, start = prompt.shape
        running = prompt.new_full((num_texts, num_beams, max(task.max_length, start)), fill)
        running[:, :, :start] = prompt[:, None]
        scores = torch.full((num_texts, num_beams), _NEVER, device=prompt.device)
        # Only the first of the equal beams may be continued at the first step.
        running_scores = scores.clone()
        running_scores[:, 0] = 0.0
        nothing = torch.zeros_like(scores, dtype=torch.bool)
        rows = torch.full_like(running, -1) if task.keep_rows else None
        return cls(running, running_scores, running.clone(), scores, nothing, ~nothing[:, :1], rows, rows)

    def select(self, slots: torch.Tensor) -> _Beams:
        parts: dict[str, Any] = {name: getattr(self, name) for name in self.__dataclass_fields__}
        chosen: dict[str, Any] = {name: None if part is None else part[slots] for name, part in parts.items()}
        return _Beams(**chosen)


def beam_search(
    state: DecoderState, task: DecodeTask, generator: torch.Generator | None = None
) -> list[list[Generated]]:
    """The best `num_return_sequences` of `num_beams` hypotheses for each prompt, best first.

    With `do_sample=True` continuations are drawn instead of taken (beam sampling). See `decode` for the arguments.
    """
    prompt, settings, max_length = task.prompt, task.settings, task.max_length
    num_texts, start = prompt.shape
    scorer = Scorer(settings, task.base, prompt.device, num_forced=task.num_forced)
    fill = settings.pad_token_id or (settings.eos_ids[0] if settings.eos_ids else 0)
    beams = _Beams.start(task, fill)
    if start >= max_length:  # nothing but the forced tokens
        alike = range(settings.num_return_sequences)
        return [[_taken(beams.running[text, 0], None, 0.0, task) for _ in alike] for text in range(num_texts)]
    roster = Roster(num_texts, task.texts_per_context)
    results: dict[int, list[Generated]] = {}

    def collect(slots: list[int]) -> None:
        for slot in slots:
            results.setdefault(roster.texts[slot], _best(beams, slot, task))

    # The prompt is read by one row a text; the rows become beams at the first reordering.
    logits = state.logits(prompt)
    for length in range(start, max_length):
        before = beams.running
        origin, tokens = _advance(beams, logits, length, task, scorer, generator)
        if length + 1 == max_length:
            break
        is_done = ~beams.can_improve[:, 0]
        if settings.early_stopping is True:
            is_done = is_done | beams.is_finished.all(dim=1)
        is_looked_at = (length + 1 - start) % task.stop_every == 0
        flags = is_done.tolist() if is_looked_at else [False] * len(is_done)
        if any(flags):
            collect([slot for slot, done in enumerate(flags) if done])
        if all(flags):
            break
        # At the first step a text has one row, and every beam comes from it.
        rows_per_text = logits.shape[0] // len(flags)
        rows = origin % rows_per_text + rows_per_text * torch.arange(len(flags), device=origin.device)[:, None]
        num_contexts = len(flags) // roster.per_context
        kept = roster.retire(flags)
        if kept is None:
            _reorder(state, rows.flatten(), logits.shape[0], before[:, :, :length].flatten(0, 1))
        else:
            slots = tokens.new_tensor(kept.slots)
            shrink(state, rows[slots].flatten(), kept.contexts, num_contexts, logits.shape[0])
            beams, tokens = beams.select(slots), tokens[slots]
        logits = state.logits(tokens.reshape(-1, 1))
    collect(list(range(len(roster.texts))))
    return [results[text] for text in range(num_texts)]


def _reorder(state: DecoderState, rows: torch.Tensor, num_rows: int, sequences: torch.Tensor) -> None:
    """Let row i continue what row `rows[i]` was; `sequences [R, L]` are the tokens that the rows have now."""
    if rows.device.type != "cpu" or len(rows) != num_rows:
        state.reorder(rows)
        return
    # Beams often keep their order, and mostly part ways late: to find out costs little where the rows are at hand.
    if rows.tolist() != list(range(num_rows)):
        differs = (sequences != sequences[rows]).any(dim=0)
        unchanged = int(differs.int().argmax()) if bool(differs.any()) else sequences.shape[1]
        state.reorder(rows, unchanged=unchanged)


def _advance(
    beams: _Beams,
    logits: torch.Tensor,
    length: int,
    task: DecodeTask,
    scorer: Scorer,
    generator: torch.Generator | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Extend the hypotheses by one token; returns the beam that each running one came from `[S, N]`, and its token.

    `logits` is `[S * N, V]`, or `[S, V]` at the first step.
    """
    settings = task.settings
    num_texts, num_beams, max_length = beams.running.shape
    per_text = logits.shape[0] // num_texts
    count = settings.num_candidates
    sequences = beams.running[:, :per_text, :length].flatten(0, 1)
    running_scores = beams.running_scores[:, :per_text]
    if settings.do_sample:
        log_probs = scorer.log_probs(sequences, logits)
        is_first = length == task.prompt.shape[1]
        passed = task.num_forced if is_first else 0
        scores, origin, tokens = _drawn(log_probs, beams.running_scores, count, generator, passed)
    else:
        scores, origin, tokens = _best_continuations(scorer, sequences, logits, running_scores, count)
    if length + 1 == max_length:
        is_end = torch.ones_like(tokens, dtype=torch.bool)
    elif settings.eos_ids:
        is_end = ends(tokens, settings.eos_ids)
    else:
        is_end = torch.zeros_like(tokens, dtype=torch.bool)
    candidates = _taking(beams.running, origin)
    candidates[:, :, length] = tokens
    candidate_rows = None
    if beams.running_rows is not None:
        candidate_rows = _taking(beams.running_rows, origin)
        first = per_text * torch.arange(num_texts, device=origin.device)[:, None]
        candidate_rows[:, :, length] = origin + first

    # The running ones take the best that do not end.
    unended = scores + is_end.float() * _NEVER
    beams.running_scores, order = unended.topk(num_beams)
    beams.running = _taking(candidates, order)
    if candidate_rows is not None:
        beams.running_rows = _taking(candidate_rows, order)
    grown = length + 1 - task.base
    _finish(beams, candidates, candidate_rows, scores, is_end, grown, settings)

    best_length = grown
    if settings.early_stopping == "never" and settings.length_penalty > 0:
        best_length = max_length - task.base
    best_possible = beams.running_scores[:, :1] / best_length**settings.length_penalty
    worst = torch.where(beams.is_finished, beams.finished_scores.amin(dim=1, keepdim=True), _NEVER)
    beams.can_improve = beams.can_improve & (best_possible > worst).any(dim=1, keepdim=True)
    return origin.gather(1, order), tokens.gather(1, order)


def _taking(hypotheses: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Hypotheses `[S, N, T]` in the order `[S, K]` of each text: `[S, K, T]`."""
    return hypotheses.gather(1, order[:, :, None].expand(-1, -1, hypotheses.shape[2]))


Continuations = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Scores, beams of origin and tokens of the continuations considered, each `[S, K]`, best first."""


def _best_continuations(
    scorer: Scorer, sequences: torch.Tensor, logits: torch.Tensor, running_scores: torch.Tensor, count: int
) -> Continuations:
    # The best of a text are among the best of its beams, so that the vocabulary is searched beam by beam.
    scores, tokens = scorer.best(sequences, logits, count)
    num_texts, per_text = running_scores.shape
    scores = (scores.view(num_texts, per_text, count) + running_scores[:, :, None]).flatten(1)
    scores, picked = scores.topk(count)
    return scores, picked // count, tokens.view(num_texts, -1).gather(1, picked)


def _drawn(
    log_probs: torch.Tensor, running_scores: torch.Tensor, count: int, generator: torch.Generator | None, passed: int
) -> Continuations:
    # At the first step the one row of a text stands for all of its beams, so that as many draws are made as later.
    vocab_size = log_probs.shape[-1]
    scores = (log_probs.view(len(running_scores), -1, vocab_size) + running_scores[:, :, None]).flatten(1)
    pass_over(scores, passed, generator)
    picked = torch.multinomial(scores.softmax(dim=-1), count, generator=generator)
    best, order = scores.gather(1, picked).sort(dim=-1, descending=True)
    picked = picked.gather(1, order)
    return best, picked // vocab_size, picked % vocab_size


def _finish(
    beams: _Beams,
    candidates: torch.Tensor,
    candidate_rows: torch.Tensor | None,
    scores: torch.Tensor,
    is_end: torch.Tensor,
    grown: int,
    settings: DecodeSettings,
) -> None:
    """Let the candidates that have just ended compete with the finished ones."""
    num_beams = beams.running.shape[1]
    ended = is_end.clone()
    ended[:, num_beams:] = False
    scores = scores / grown**settings.length_penalty
    if settings.early_stopping is True:
        scores = scores + beams.is_finished.all(dim=1, keepdim=True).float() * _NEVER
    scores = scores + (~beams.can_improve).float() * _NEVER + (~ended).float() * _NEVER
    merged = torch.cat((beams.finished_scores, scores), dim=1)
    beams.finished_scores, order = merged.topk(num_beams)
    beams.finished = _taking(torch.cat((beams.finished, candidates), dim=1), order)
    if beams.finished_rows is not None and candidate_rows is not None:
        beams.finished_rows = _taking(torch.cat((beams.finished_rows, candidate_rows), dim=1), order)
    beams.is_finished = torch.cat((beams.is_finished, ended), dim=1).gather(1, order)


def _best(beams: _Beams, slot: int, task: DecodeTask) -> list[Generated]:
    scores = beams.finished_scores[slot].tolist()
    rows = beams.finished_rows
    return [
        _taken(beams.finished[slot, beam], None if rows is None else rows[slot, beam], scores[beam], task)
        for beam in range(task.settings.num_return_sequences)
    ]


def _taken(sequence: torch.Tensor, rows: torch.Tensor | None, score: float, task: DecodeTask) -> Generated:
    tokens = cut(sequence[task.base :].tolist(), task.settings.eos_ids)
    kept = None if rows is None else rows[task.base : task.base + len(tokens)].tolist()
    return Generated(tokens, score, kept)
