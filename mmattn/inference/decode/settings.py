"""How to decode: transformers' names and defaults, checked."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from mmattn.errors import CheckpointError, UsageError
from mmattn.inference.decode.checks import SAMPLING_ONLY, check_tokens, check_values

# Settings of transformers that change the tokens and are not offered here, with the value that switches each off.
_UNSUPPORTED = {
    "constraints": None,
    "diversity_penalty": 0.0,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "exponential_decay_length_penalty": None,
    "force_words_ids": None,
    "guidance_scale": None,
    "max_time": None,
    "num_beam_groups": 1,
    "penalty_alpha": None,
    "sequence_bias": None,
    "stop_strings": None,
    "top_h": None,
    "watermarking_config": None,
}
DEFAULT_NEW_TOKENS = 20


@dataclass(frozen=True)
class DecodeSettings:
    """Generation settings under transformers' names, with transformers' defaults and meaning.

    Lengths count the prompt in `max_length` and `min_length`, and do not in `max_new_tokens` and `min_new_tokens`,
    which win when both are set. Without either, 20 new tokens are made.
    """

    max_new_tokens: int | None = None
    max_length: int | None = None
    min_new_tokens: int | None = None
    min_length: int = 0
    num_beams: int = 1
    num_return_sequences: int = 1
    do_sample: bool = False
    early_stopping: bool | Literal["never"] = False
    length_penalty: float = 1.0
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    min_p: float | None = None
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    bad_words_ids: Sequence[Sequence[int]] | None = None
    forced_bos_token_id: int | None = None
    forced_eos_token_id: int | Sequence[int] | None = None
    suppress_tokens: Sequence[int] | None = None
    begin_suppress_tokens: Sequence[int] | None = None
    remove_invalid_values: bool = False
    renormalize_logits: bool = False
    eos_token_id: int | Sequence[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        check_values(self)

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The tokens that end a text; empty when nothing but the length does."""
        if self.eos_token_id is None:
            return ()
        return (self.eos_token_id,) if isinstance(self.eos_token_id, int) else tuple(self.eos_token_id)

    @property
    def num_candidates(self) -> int:
        """Continuations of a text that beam search looks at in a step: enough that some of them do not end it."""
        return max(2, 1 + len(self.eos_ids)) * self.num_beams

    def total_length(self, prompt_length: int) -> int:
        """Longest text, prompt included, that a prompt of this length may grow to.

        Raises:
            UsageError: when the prompt alone already fills `max_length`.
        """
        if self.max_new_tokens is not None:
            return prompt_length + self.max_new_tokens
        if self.max_length is None:
            return prompt_length + DEFAULT_NEW_TOKENS
        if prompt_length >= self.max_length:
            raise UsageError(
                f"the prompt has {prompt_length} tokens and max_length={self.max_length} counts it; "
                "raise max_length or give max_new_tokens"
            )
        return self.max_length

    @classmethod
    def from_generation_config(cls, values: Mapping[str, Any], vocab_size: int) -> DecodeSettings:
        """Settings from the content of a `generation_config.json`; says which active ones it has to leave out.

        Raises:
            CheckpointError: a value that cannot be, or a token that is not in the vocabulary.
        """
        known = {field.name for field in fields(cls)}
        left_out = sorted(name for name, off in _UNSUPPORTED.items() if values.get(name, off) not in (off, None))
        if left_out:
            warnings.warn(
                f"generation_config.json sets {', '.join(left_out)}, not supported and left out", stacklevel=2
            )
        try:
            settings = cls(**{name: value for name, value in values.items() if name in known and value is not None})
            return settings.for_vocabulary(vocab_size)
        except UsageError as error:
            raise CheckpointError(f"generation_config.json: {error}") from error

    def for_vocabulary(self, size: int) -> DecodeSettings:
        """These settings, when a model with a vocabulary of this size can follow them.

        Raises:
            UsageError: it cannot.
        """
        check_tokens(self, size)
        return self

    def updated(self, **arguments: Any) -> DecodeSettings:
        """These settings with some changed, for one call.

        Raises:
            UsageError: for an unknown name (it names the nearest known one), a wrong value, or a sampling setting
                without `do_sample=True`.
        """
        known = [field.name for field in fields(self)]
        for name in arguments:
            if name in known:
                continue
            if name in _UNSUPPORTED:
                raise UsageError(f"the generation argument {name!r} is not supported")
            nearest = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else f"; known are {', '.join(known)}"
            raise UsageError(f"unknown generation argument {name!r}{hint}")
        if "max_length" in arguments and "max_new_tokens" not in arguments:
            arguments["max_new_tokens"] = None
        if "min_length" in arguments and "min_new_tokens" not in arguments:
            arguments["min_new_tokens"] = None
        # As in transformers, None switches a setting off, whatever the checkpoint says.
        off = {field.name: field.default for field in fields(self)} | {"top_k": 0}
        changed = replace(self, **{name: off[name] if value is None else value for name, value in arguments.items()})
        idle = [name for name in SAMPLING_ONLY if name in arguments and not changed.do_sample]
        if idle:
            raise UsageError(f"{', '.join(idle)} has no effect without do_sample=True")
        return changed
