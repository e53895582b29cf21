"""What a transformers model's `generate` returned, as the arguments of one forward over the finished texts.

B rows of the inputs, B' texts (several of a row with `num_return_sequences`), L tokens, Lk of a source.
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import GenerationMixin
from transformers.modeling_outputs import BaseModelOutput

from mmattn.errors import RunError, UsageError

TARGETS = ("decoder_input_ids", "input_ids")
_GROWING = (
    "attention_mask",
    "cross_attention_mask",
    "image_attention_mask",
)  # that have a place for each token of a text


class Call(NamedTuple):
    """The arguments of a call of `generate`.

    Attributes:
        args: by place.
        kwargs: by name.
        states: `[B, Lk, C]` of a source that the caller has encoded; beams change the caller's object.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    states: Tensor | None

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """A call that is about to be made."""
        encoded = kwargs.get("encoder_outputs")
        return cls(args, kwargs, None if encoded is None else encoded[0])

    def named(self, model: Any) -> dict[str, Any]:
        """By the names that the model's forward has for them."""
        given = dict(self.kwargs)
        if self.args:
            given[model.main_input_name] = self.args[0]
        if given.get("inputs") is not None:
            given[model.main_input_name] = given.pop("inputs")
        return given


def check_call(model: Any, call: Call) -> None:
    """Raise `UsageError` for a generation whose texts could not be read again, before it is run."""
    given = call.named(model)
    sound, places = given.get("input_features"), getattr(model.config, "max_source_positions", None)
    if isinstance(sound, Tensor) and isinstance(places, int) and sound.shape[-1] > 2 * places:
        raise UsageError(
            f"record_attention: {sound.shape[-1]} frames are generated from window by window: record windows of"
            f" {2 * places} frames, one call each"
        )
    if isinstance(given.get("inputs_embeds"), Tensor) and not model.config.is_encoder_decoder:
        raise UsageError(
            "record_attention: generate(inputs_embeds=...) returns no tokens of its prompt, so that its texts cannot be"
            " read again: give input_ids"
        )
    has_own = getattr(type(model), "generate", None) is not vars(GenerationMixin)["generate"]
    if has_own and given.get("attention_mask") is None and _has_padding(model, given.get("input_ids")):
        raise UsageError(
            f"record_attention: {type(model).__name__}.generate() is given texts of different lengths without an "
            "attention_mask, so that it is not known which tokens are padding: give attention_mask"
        )


def _has_padding(model: Any, ids: Any) -> bool:
    config = getattr(model.config, "text_config", model.config)
    pad = getattr(config, "pad_token_id", None)
    return isinstance(ids, Tensor) and pad is not None and bool((ids == pad).any())


def rereading(model: Any, call: Call, output: Any, first: dict[str, Any] | None) -> tuple[dict[str, Any], int]:
    """Arguments of a forward over the finished texts, and how many of their tokens were given.

    Args:
        model: that generated.
        call: what it was given.
        output: what it returned.
        first: arguments of the first forward of the generation; None: there was none of the model itself.

    Raises:
        RunError: an output without the texts' tokens, such as sound.
    """
    named, first = call.named(model), first or {}
    known = inspect.signature(model.forward).parameters
    given = {name: value for name, value in named.items() if name in known and isinstance(value, Tensor)}
    states = call.states if "encoder_outputs" in known else None
    sequences, num_given = _with_prefix(_sequences(output), first)
    batch = next((len(value) for value in given.values()), len(sequences) if states is None else len(states))
    given |= _noted_mask(given, first, batch)
    is_pair = "decoder_input_ids" in known and model.config.is_encoder_decoder
    name = "decoder_input_ids" if is_pair else "input_ids"
    given.pop("decoder_input_ids", None)
    repeats = max(1, len(sequences) // max(1, batch))
    repeated: dict[str, Any] = {key: value.repeat_interleave(repeats, dim=0) for key, value in given.items()}
    if states is not None:
        repeated["encoder_outputs"] = BaseModelOutput(states.repeat_interleave(repeats, dim=0))
    if name == "input_ids":
        repeated |= {key: _grown(repeated[key], sequences.shape[1]) for key in _GROWING if key in repeated}
    return repeated | {name: sequences}, num_given


def _sequences(output: Any) -> Tensor:
    found = output if isinstance(output, Tensor) else getattr(output, "sequences", None)
    found = output.get("sequences") if isinstance(output, dict) else found
    if not isinstance(found, Tensor):
        raise RunError(
            f"record_attention: generate() returned a {type(output).__name__} without sequences, so that its texts "
            "cannot be read again; let it return token ids"
        )
    if found.dim() != 2 or found.is_floating_point():
        raise RunError(
            f"record_attention: generate() returned {found.dtype} {list(found.shape)} rather than rows of token ids, "
            "so that its texts cannot be read again: record a forward"
        )
    return found


def _noted_mask(given: dict[str, Tensor], first: dict[str, Any], batch: int) -> dict[str, Tensor]:
    """The mask that `generate` made of padding; its rows are repeated for beams."""
    ids, mask = given.get("input_ids"), first.get("attention_mask")
    if ids is None or "attention_mask" in given or not isinstance(mask, Tensor) or len(mask) % batch:
        return {}
    mask = mask[:: len(mask) // batch]
    return {"attention_mask": mask} if mask.shape == ids.shape else {}


def _with_prefix(sequences: Tensor, first: dict[str, Any]) -> tuple[Tensor, int]:
    """Texts with what their generation began with, which some models leave out, and its length."""
    prefix = first_of(first, TARGETS)
    if prefix is None:
        return sequences, 1
    length = prefix.shape[1]
    if sequences.shape[1] >= length and torch.equal(sequences[:1, :length], prefix[:1]):
        return sequences, length
    each = prefix.repeat_interleave(max(1, len(sequences) // len(prefix)), dim=0)[: len(sequences)]
    return torch.cat([each, sequences], dim=1), length


def first_of(given: dict[str, Any], names: tuple[str, ...]) -> Tensor | None:
    """The first of some arguments that is a tensor."""
    return next((given[name] for name in names if isinstance(given.get(name), Tensor)), None)


def _grown(mask: Tensor, length: int) -> Tensor:
    """A mask [B, L', ...] with its last place repeated for tokens that came after it."""
    missing = length - mask.shape[1]
    if missing <= 0:
        return mask[:, :length]
    return torch.cat([mask, mask[:, -1:].expand(-1, missing, *mask.shape[2:])], dim=1)
