"""Whether generation settings have values that can be: of the right kind, in range, tokens of the vocabulary."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, TypeGuard

from mmattn.errors import UsageError

if TYPE_CHECKING:
    from mmattn.inference.decode.settings import DecodeSettings

SAMPLING_ONLY = ("temperature", "top_k", "top_p", "min_p", "typical_p")
_SMALLEST = {
    "max_new_tokens": 1,
    "max_length": 1,
    "num_beams": 1,
    "num_return_sequences": 1,
    "min_new_tokens": 0,
    "min_length": 0,
    "no_repeat_ngram_size": 0,
    "top_k": 0,
}
_SWITCHES = ("do_sample", "remove_invalid_values", "renormalize_logits")
_MAY_BE_NONE = ("max_new_tokens", "max_length", "min_new_tokens", "min_p")
# Lowest and highest value, and whether the lowest itself is allowed.
_RANGES = {
    "length_penalty": (-math.inf, math.inf, False),
    "repetition_penalty": (0.0, math.inf, False),
    "temperature": (0.0, math.inf, False),
    "top_p": (0.0, 1.0, True),
    "typical_p": (0.0, 1.0, False),
    "min_p": (0.0, 1.0, True),
}
_ONE_TOKEN = ("forced_bos_token_id", "pad_token_id")
_ONE_OR_MORE = ("eos_token_id", "forced_eos_token_id")
_LISTS = ("suppress_tokens", "begin_suppress_tokens")


def check_values(settings: DecodeSettings) -> None:
    """Raise unless every setting can be used; the vocabulary is not known here.

    Raises:
        UsageError: a setting of another kind or out of its range, or settings that do not go together.
    """
    for name, smallest in _SMALLEST.items():
        value = getattr(settings, name)
        if value is None and name in _MAY_BE_NONE:
            continue
        if not isinstance(value, Integral) or isinstance(value, bool):
            raise UsageError(f"{name} is {value!r}; it must be a whole number")
        if value < smallest:
            raise UsageError(f"{name} is {value}; it must be at least {smallest}")
    for name in _SWITCHES:
        if not isinstance(getattr(settings, name), bool):
            raise UsageError(f"{name} is {getattr(settings, name)!r}; it must be True or False")
    early = settings.early_stopping
    if not isinstance(early, bool) and early != "never":
        raise UsageError(f"early_stopping is {early!r}; it must be True, False or 'never'")
    for name in _RANGES:
        if settings.do_sample or name not in SAMPLING_ONLY:
            _check_range(name, getattr(settings, name))
    for name, tokens in _token_lists(settings):
        if not all(_is_count(token) for token in tokens):
            raise UsageError(f"{name} is {getattr(settings, name)!r}; it must be {_shape_of(name)}")
    _check_counts(settings)


def _is_count(token: Any) -> bool:
    return isinstance(token, Integral) and not isinstance(token, bool) and int(token) >= 0


def _shape_of(name: str) -> str:
    if name == "bad_words_ids":
        return "a list of lists of token numbers, one for each word"
    if name in _LISTS:
        return "a list of token numbers"
    return "a token number" + (" or a list of them" if name in _ONE_OR_MORE else "")


def _check_range(name: str, value: Any) -> None:
    if value is None and name in _MAY_BE_NONE:
        return
    low, high, with_low = _RANGES[name]
    number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    if math.isfinite(number) and low <= number <= high and (with_low or number > low):
        return
    limits = ["a finite number", f"{'at least' if with_low else 'above'} {low:g}", f"at most {high:g}"]
    wanted = " and ".join([limit for limit in limits[1:] if "inf" not in limit] or limits[:1])
    hint = " (do_sample=False takes the best)" if name == "temperature" else ""
    raise UsageError(f"{name} is {value!r}; it must be {wanted}{hint}")


def _token_lists(settings: DecodeSettings) -> Iterator[tuple[str, list[Any]]]:
    """Every list of tokens with the name of its setting; what is no list of them is a list with something else."""
    for name in (*_ONE_TOKEN, *_ONE_OR_MORE, *_LISTS):
        value = getattr(settings, name)
        if value is None:
            continue
        if _is_list(value) and name not in _ONE_TOKEN:
            yield name, list(value)
        else:
            yield name, [value if name not in _LISTS else None]
    words: Any = settings.bad_words_ids
    for word in () if words is None else words if _is_list(words) else [None]:
        yield "bad_words_ids", list(word) if _is_list(word) and word else [None]


def _is_list(value: Any) -> TypeGuard[Collection[Any]]:
    return isinstance(value, Collection) and not isinstance(value, str | bytes)


def _check_counts(settings: DecodeSettings) -> None:
    wanted, beams = settings.num_return_sequences, settings.num_beams
    if wanted > beams and not settings.do_sample:
        raise UsageError(f"num_return_sequences={wanted} needs as many beams (num_beams={beams}) or do_sample=True")
    if wanted > beams > 1:
        raise UsageError(f"num_return_sequences={wanted} is more than num_beams={beams}")


def check_tokens(settings: DecodeSettings, vocab_size: int) -> None:
    """Raise unless the vocabulary has the tokens that the settings name, and enough of them for the beams.

    Raises:
        UsageError: it has not.
    """
    for name, tokens in _token_lists(settings):
        beyond = [token for token in tokens if token >= vocab_size]
        if beyond:
            raise UsageError(f"{name} holds token {beyond[0]}, and this model has {vocab_size}: 0 to {vocab_size - 1}")
    beams = settings.num_beams
    if beams > 1 and settings.num_candidates > vocab_size:
        raise UsageError(f"num_beams is {beams}; that is too many for this model's {vocab_size} tokens")
