"""Beam search, step for step as transformers' `generate` does it, with the context shared by the beams.

A text keeps two lists of `num_beams` hypotheses: running ones, which may grow, and finished ones. At each step the best
`(eos tokens + 1) * num_beams` continuations of the running ones are taken; those among the best `num_beams` that end
compete with the finished ones by `score / length ** length_penalty`, and the best that do not end run on.
S texts, N beams, V vocabulary, T longest length.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mmattn.inference.decode.logits import build_processors
from mmattn.inference.decode.settings import DecodeSettings
from mmattn.inference.decode.state import DecoderState, Generated
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
    """

    running: torch.Tensor
    running_scores: torch.Tensor
    finished: torch.Tensor
    finished_scores: torch.Tensor
    is_finished: torch.Tensor
    can_improve: torch.Tensor

    @classmethod
    def start(cls, prompt: torch.Tensor, num_beams: int, max_length: int, fill: int) -> _Beams:
        num_texts, start = prompt.shape
        running = prompt.new_full((num_texts, num_beams, max_length), fill)
        running[:, :, :start] = prompt[:, None]
        scores = torch.full((num_texts, num_beams), _NEVER, device=prompt.device)
        # Only the first of the equal beams may be continued at the first step.
        running_scores = scores.clone()
        running_scores[:, 0] = 0.0
        nothing = torch.zeros_like(scores, dtype=torch.bool)
        return cls(running, running_scores, running.clone(), scores, nothing, ~nothing[:, :1])

    def select(self, slots: torch.Tensor) -> _Beams:
        return _Beams(*(getattr(self, name)[slots] for name in self.__dataclass_fields__))


def beam_search(
    state: DecoderState,
    prompt: torch.Tensor,
    settings: DecodeSettings,
    *,
    texts_per_context: int = 1,
    generator: torch.Generator | None = None,
) -> list[list[Generated]]:
    """The best `num_return_sequences` of `num_beams` hypotheses for each prompt, best first.

    With `do_sample=True` continuations are drawn instead of taken (beam sampling). See `decode` for the arguments.
    """
    num_texts, start = prompt.shape
    num_beams, max_length = settings.num_beams, settings.total_length(start)
    processors = build_processors(settings, start, prompt.device)
    fill = settings.pad_token_id or (settings.eos_ids[0] if settings.eos_ids else 0)
    beams = _Beams.start(prompt, num_beams, max_length, fill)
    roster = Roster(num_texts, texts_per_context)
    results: dict[int, list[Generated]] = {}

    def collect(slots: list[int]) -> None:
        for slot in slots:
            results.setdefault(roster.texts[slot], _best(beams, slot, start, settings))

    # The prompt is read by one row a text; the rows become beams at the first reordering.
    logits = state.logits(prompt)
    for length in range(start, max_length):
        sequences = beams.running[:, : logits.shape[0] // len(roster.texts), :length].flatten(0, 1)
        log_probs = logits.float().log_softmax(dim=-1)
        log_probs = processors(sequences, log_probs)  # type: ignore[arg-type]
        origin, tokens = _advance(beams, log_probs, length, start, settings, generator)
        if length + 1 == max_length:
            break
        is_done = ~beams.can_improve[:, 0]
        if settings.early_stopping is True:
            is_done = is_done | beams.is_finished.all(dim=1)
        flags = is_done.tolist()
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
            _reorder(state, rows.flatten(), logits.shape[0])
        else:
            slots = tokens.new_tensor(kept.slots)
            shrink(state, rows[slots].flatten(), kept.contexts, num_contexts, logits.shape[0])
            beams, tokens = beams.select(slots), tokens[slots]
        logits = state.logits(tokens.reshape(-1, 1))
    collect(list(range(len(roster.texts))))
    return [results[text] for text in range(num_texts)]


def _reorder(state: DecoderState, rows: torch.Tensor, num_rows: int) -> None:
    # Beams often keep their order; to notice that costs nothing where the rows are at hand.
    in_place = rows.device.type == "cpu" and rows.tolist() == list(range(num_rows))
    if not in_place:
        state.reorder(rows)


def _advance(
    beams: _Beams,
    log_probs: torch.Tensor,
    length: int,
    start: int,
    settings: DecodeSettings,
    generator: torch.Generator | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Extend the hypotheses by one token; returns the beam that each running one came from `[S, N]`, and its token.

    `log_probs` is `[S * N, V]`, or `[S, V]` at the first step.
    """
    num_texts, num_beams, max_length = beams.running.shape
    vocab_size = log_probs.shape[-1]
    log_probs = log_probs.view(num_texts, -1, vocab_size) + beams.running_scores[:, :, None]
    scores, origin, tokens = _continuations(log_probs.flatten(1), vocab_size, num_beams, settings, generator)
    if length + 1 == max_length:
        is_end = torch.ones_like(tokens, dtype=torch.bool)
    elif settings.eos_ids:
        is_end = ends(tokens, settings.eos_ids)
    else:
        is_end = torch.zeros_like(tokens, dtype=torch.bool)
    candidates = beams.running.gather(1, origin[:, :, None].expand(-1, -1, max_length))
    candidates[:, :, length] = tokens

    # The running ones take the best that do not end.
    running_scores = scores + is_end.float() * _NEVER
    order = running_scores.topk(num_beams).indices
    beams.running = candidates.gather(1, order[:, :, None].expand(-1, -1, max_length))
    beams.running_scores = running_scores.gather(1, order)
    _finish(beams, candidates, scores, is_end, length + 1 - start, settings)

    grown = length + 1 - start
    best_length = max_length - start if settings.early_stopping == "never" and settings.length_penalty > 0 else grown
    best_possible = beams.running_scores[:, :1] / best_length**settings.length_penalty
    worst = torch.where(beams.is_finished, beams.finished_scores.amin(dim=1, keepdim=True), _NEVER)
    beams.can_improve = beams.can_improve & (best_possible > worst).any(dim=1, keepdim=True)
    return origin.gather(1, order), tokens.gather(1, order)


def _continuations(
    scores: torch.Tensor, vocab_size: int, num_beams: int, settings: DecodeSettings, generator: torch.Generator | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores, beams of origin and tokens of the continuations considered, each `[S, K]`, best first."""
    count = max(2, 1 + len(settings.eos_ids)) * num_beams
    if settings.do_sample:
        picked = torch.multinomial(scores.softmax(dim=-1), count, generator=generator)
        best, order = scores.gather(1, picked).sort(dim=-1, descending=True)
        picked = picked.gather(1, order)
    else:
        best, picked = scores.topk(count)
    return best, picked // vocab_size, picked % vocab_size


def _finish(
    beams: _Beams,
    candidates: torch.Tensor,
    scores: torch.Tensor,
    is_end: torch.Tensor,
    grown: int,
    settings: DecodeSettings,
) -> None:
    """Let the candidates that have just ended compete with the finished ones."""
    num_beams, max_length = beams.running.shape[1:]
    ended = is_end.clone()
    ended[:, num_beams:] = False
    scores = scores / grown**settings.length_penalty
    if settings.early_stopping is True:
        scores = scores + beams.is_finished.all(dim=1, keepdim=True).float() * _NEVER
    scores = scores + (~beams.can_improve).float() * _NEVER + (~ended).float() * _NEVER
    merged = torch.cat((beams.finished_scores, scores), dim=1)
    beams.finished_scores, order = merged.topk(num_beams)
    tokens = torch.cat((beams.finished, candidates), dim=1)
    beams.finished = tokens.gather(1, order[:, :, None].expand(-1, -1, max_length))
    beams.is_finished = torch.cat((beams.is_finished, ended), dim=1).gather(1, order)


def _best(beams: _Beams, slot: int, start: int, settings: DecodeSettings) -> list[Generated]:
    count = settings.num_return_sequences
    scores = beams.finished_scores[slot, :count].tolist()
    tokens = beams.finished[slot, :count, start:].tolist()
    return [Generated(cut(text, settings.eos_ids), score) for text, score in zip(tokens, scores, strict=True)]
