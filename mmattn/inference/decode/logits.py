"""The chain of changes made to the scores before a token is chosen: transformers' processors, in its order."""

from __future__ import annotations

import torch
from transformers.generation import logits_process as stock

from mmattn.inference.decode.settings import DecodeSettings


def build_processors(settings: DecodeSettings, prompt_length: int, device: torch.device) -> stock.LogitsProcessorList:
    """Processors for prompts of one length; called with `(sequences [R, L], scores [R, V])`, empty when none is set.

    The order is that of transformers' `GenerationMixin._get_logits_processor`, on which the result depends.
    """
    eos = torch.tensor(settings.eos_ids, device=device) if settings.eos_ids else None
    chain = stock.LogitsProcessorList()
    if settings.repetition_penalty != 1.0:
        chain.append(stock.RepetitionPenaltyLogitsProcessor(settings.repetition_penalty))
    if settings.no_repeat_ngram_size > 0:
        chain.append(stock.NoRepeatNGramLogitsProcessor(settings.no_repeat_ngram_size))
    if settings.bad_words_ids:
        words = [list(word) for word in settings.bad_words_ids]
        chain.append(stock.NoBadWordsLogitsProcessor(words, eos))  # type: ignore[arg-type]
    if eos is not None:
        _add_minimum(chain, settings, prompt_length, eos)
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
        begin = prompt_length + (prompt_length == 1 and settings.forced_bos_token_id is not None)
        suppressed = list(settings.begin_suppress_tokens)
        chain.append(stock.SuppressTokensAtBeginLogitsProcessor(suppressed, begin, device=str(device)))
    if settings.do_sample:
        _add_warpers(chain, settings)
    if settings.renormalize_logits:
        chain.append(stock.LogitNormalization())
    return chain


def _add_minimum(
    chain: stock.LogitsProcessorList, settings: DecodeSettings, prompt_length: int, eos: torch.Tensor
) -> None:
    device = str(eos.device)
    if settings.min_new_tokens:
        chain.append(
            stock.MinNewTokensLengthLogitsProcessor(prompt_length, settings.min_new_tokens, eos, device=device)
        )
    elif settings.min_length > 0:
        chain.append(stock.MinLengthLogitsProcessor(settings.min_length, eos, device=device))


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
