"""The chain of changes made to the scores before a token is chosen: transformers' processors, in its order."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers.generation import logits_process as stock

from mmattn.inference.decode.settings import DecodeSettings


def build_processors(
    settings: DecodeSettings, prompt_length: int, device: torch.device, *, num_forced: int = 0
) -> stock.LogitsProcessorList:
    """Processors for prompts of one length; called with `(sequences [R, L], scores [R, V])`, empty when none is set.

    The order is that of transformers' `GenerationMixin._get_logits_processor`, on which the result depends.

    Args:
        settings: the settings.
        prompt_length: tokens before the first that counts as generated.
        device: of the scores.
        num_forced: tokens after those that are given, and count as generated.
    """
    eos = torch.tensor(settings.eos_ids, device=device) if settings.eos_ids else None
    chain = stock.LogitsProcessorList()
    if settings.repetition_penalty != 1.0:
        chain.append(stock.RepetitionPenaltyLogitsProcessor(settings.repetition_penalty))
    if settings.no_repeat_ngram_size > 0:
        chain.append(stock.NoRepeatNGramLogitsProcessor(settings.no_repeat_ngram_size))
    words = [list(word) for word in settings.bad_words_ids or ()]
    banned = {word[0] for word in words if len(word) == 1} - set(settings.eos_ids)
    if banned:  # what stock's processor does for them, without a vocabulary of biases at each step
        chain.append(NeverTokens(sorted(banned), device))
    if any(len(word) > 1 for word in words):
        long = [word for word in words if len(word) > 1]
        chain.append(stock.NoBadWordsLogitsProcessor(long, eos))  # type: ignore[arg-type]
    # As in transformers the number of new tokens comes before the length, even where it is 0.
    new = settings.min_new_tokens
    shortest = settings.min_length if new is None else prompt_length + new
    if settings.eos_ids and shortest > 0:
        chain.append(NeverTokens(settings.eos_ids, device, until=shortest))
    if settings.forced_bos_token_id is not None:
        chain.append(stock.ForcedBOSTokenLogitsProcessor(settings.forced_bos_token_id))
    if settings.forced_eos_token_id is not None:
        forced = settings.forced_eos_token_id
        forced = forced if isinstance(forced, int) else list(forced)
        total = settings.total_length(prompt_length)
        chain.append(stock.ForcedEOSTokenLogitsProcessor(total, forced, device=str(device)))
    if settings.remove_invalid_values:
        chain.append(stock.InfNanRemoveLogitsProcessor())
    if settings.suppress_tokens:
        chain.append(stock.SuppressTokensLogitsProcessor(list(settings.suppress_tokens), device=str(device)))
    if settings.begin_suppress_tokens:
        # The first token that is free: as in transformers, what is forced is passed over.
        begin = prompt_length + (num_forced or (prompt_length == 1 and settings.forced_bos_token_id is not None))
        suppressed = list(settings.begin_suppress_tokens)
        chain.append(stock.SuppressTokensAtBeginLogitsProcessor(suppressed, begin, device=str(device)))
    if settings.do_sample:
        _add_warpers(chain, settings)
    if settings.renormalize_logits:
        chain.append(stock.LogitNormalization())
    return chain


class NeverTokens(stock.LogitsProcessor):
    """Gives some tokens no chance, as stock's processors for single bad words and shortest lengths, at less expense.

    Args:
        tokens: the tokens.
        device: of the scores.
        until: only in texts of fewer tokens than this, the prompt's counted; None: always.
    """

    def __init__(self, tokens: Sequence[int], device: torch.device, *, until: int | None = None) -> None:
        self._tokens = torch.tensor(tokens, device=device)
        self._until = until

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """`scores [R, V]` with the tokens at -inf, in place."""
        if self._until is not None and input_ids.shape[-1] >= self._until:
            return scores
        return scores.index_fill_(1, self._tokens, float("-inf"))


class Scorer:
    """Log-probabilities of the next token, with every change that the settings ask for.

    Args:
        settings: the settings.
        prompt_length, device, num_forced: see `build_processors`.
    """

    def __init__(
        self, settings: DecodeSettings, prompt_length: int, device: torch.device, *, num_forced: int = 0
    ) -> None:
        self._processors = build_processors(settings, prompt_length, device, num_forced=num_forced)
        forced_at = None if settings.forced_eos_token_id is None else settings.total_length(prompt_length) - 1
        # Where tokens are only struck out, and no other score changes, the whole vocabulary need not be rewritten.
        light = (NeverTokens, stock.ForcedEOSTokenLogitsProcessor)
        self._strikes_only = all(isinstance(each, light) for each in self._processors)
        self._forced_at = forced_at

    def log_probs(self, sequences: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """`sequences [R, L]` so far and `logits [R, V]` to `[R, V]`."""
        return self._processors(sequences, logits.float().log_softmax(dim=-1))  # type: ignore[arg-type]

    def best(self, sequences: torch.Tensor, logits: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The `count` largest of `log_probs` in each row and their tokens, `[R, count]` each, largest first.

        `logits` may be overwritten.
        """
        if not self._strikes_only or sequences.shape[1] == self._forced_at:
            return largest(self.log_probs(sequences, logits), count)
        logits = logits.float()
        if logits.device.type == "cpu":
            # What log_softmax takes off is the same in every column, and it is the quickest way to it; a few rows at a
            # time, so that what it writes stays in the cache.
            total = torch.cat([rows[:, :1] - rows.log_softmax(dim=-1)[:, :1] for rows in logits.split(_ROWS)])
        else:
            total = logits.logsumexp(dim=-1, keepdim=True)
        for processor in self._processors:
            if isinstance(processor, NeverTokens):
                logits = processor(sequences, logits)
        scores, tokens = largest(logits, count)
        return scores - total, tokens


_BLOCK = 256
_ROWS = 4


def likeliest(scores: torch.Tensor) -> torch.Tensor:
    """As `scores.argmax(dim=1)` for `[R, V]`, but on a CPU in less time: argmax reads number by number.

    The first of equal scores is taken, as argmax does.
    """
    num_rows, size = scores.shape
    whole = size // _BLOCK
    if scores.device.type != "cpu" or whole < 4:
        return scores.argmax(dim=1)
    tops = scores[:, : whole * _BLOCK].view(num_rows, whole, _BLOCK).amax(dim=-1)
    block = tops.argmax(dim=1)
    inside = scores.gather(1, block[:, None] * _BLOCK + torch.arange(_BLOCK))
    best = block * _BLOCK + inside.argmax(dim=1)
    if whole * _BLOCK == size:
        return best
    last, place = scores[:, whole * _BLOCK :].max(dim=1)
    return torch.where(last > tops.amax(dim=1), place + whole * _BLOCK, best)


def largest(scores: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """As `scores.topk(count)` for `[R, V]`, but on a CPU in less time where V is large.

    Topk sorts every row's copy. The largest lie in the `count` blocks whose own largest are largest, so only those are
    sorted, and finding them is one reading.
    """
    num_rows, size = scores.shape
    whole = size // _BLOCK
    if scores.device.type != "cpu" or whole < 4 * count:
        return scores.topk(count)
    blocks = scores[:, : whole * _BLOCK].view(num_rows, whole, _BLOCK)
    chosen = blocks.amax(dim=-1).topk(count).indices
    places = (chosen[:, :, None] * _BLOCK + torch.arange(_BLOCK)).view(num_rows, -1)
    rest = torch.arange(whole * _BLOCK, size).expand(num_rows, -1)
    places = torch.cat((places, rest), dim=1)
    found, order = scores.gather(1, places).topk(count)
    return found, places.gather(1, order)


def _add_warpers(chain: stock.LogitsProcessorList, settings: DecodeSettings) -> None:
    # A beam needs a candidate that does not end the text beside every one that does.
    keep = max(2, len(settings.eos_ids) + 1) if settings.num_beams > 1 else 1
    if settings.temperature != 1.0:
        chain.append(stock.TemperatureLogitsWarper(float(settings.temperature)))
    if settings.top_k:
        chain.append(stock.TopKLogitsWarper(settings.top_k, min_tokens_to_keep=keep))
    if settings.top_p < 1.0:
        chain.append(stock.TopPLogitsWarper(settings.top_p, min_tokens_to_keep=keep))
    if settings.min_p is not None:
        chain.append(stock.MinPLogitsWarper(settings.min_p, min_tokens_to_keep=keep))
    if settings.typical_p < 1.0:
        chain.append(stock.TypicalLogitsWarper(settings.typical_p, min_tokens_to_keep=keep))
