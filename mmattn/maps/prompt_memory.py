"""Which text the embeddings that a diffusion model gets were made of: prompts are remembered as a pipeline encodes
them.

Pipelines hand their models embeddings only, and may batch, repeat or reorder them in any way. A row is known again by
its contents, exactly.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmattn.maps.in_place import in_place
from mmattn.swap.layers import SetAttribute

MOST_TEXTS, MOST_BYTES = 1024, 64 * 2**20  # that are remembered, or those of one call where they are more

Note = Callable[[dict[str, Any], Any], None]
_NOTES: ContextVar[tuple[tuple[Any, Note], ...]] = ContextVar("mmattn_prompt_notes", default=())


@contextlib.contextmanager
def noting_prompts(pipeline: Any, note: Note) -> Iterator[None]:
    """Within the block (and this thread or task only), `note(arguments, result)` is told of every call of the
    pipeline's `encode_prompt`, whoever makes it. Nothing happens for a pipeline without one."""
    if not hasattr(pipeline, "encode_prompt"):
        yield
        return
    with in_place(
        pipeline, "encode_prompt", lambda: [SetAttribute(pipeline, "encode_prompt", _EncodePrompt(pipeline))]
    ):
        token = _NOTES.set((*_NOTES.get(), (pipeline, note)))
        try:
            yield
        finally:
            _NOTES.reset(token)


class _EncodePrompt:
    """Stands in for a pipeline's `encode_prompt`."""

    def __init__(self, pipeline: Any) -> None:
        self._pipeline = pipeline
        self._original = pipeline.encode_prompt
        # Asked for by others who look at the arguments.
        self.__signature__ = inspect.signature(pipeline.encode_prompt)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result = self._original(*args, **kwargs)
        for pipeline, note in _NOTES.get():
            if pipeline is self._pipeline:
                note(self._arguments(args, kwargs), result)
        return result

    def _arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """By name, with prompts as they reached the tokenizer."""
        given = self.__signature__.bind(*args, **kwargs).arguments
        parameter = self.__signature__.parameters.get("clean_caption")
        is_cleaned = parameter is not None and given.get("clean_caption", parameter.default)
        for name in ("prompt", "negative_prompt"):
            if given.get(name) is not None:
                given[name] = as_tokenized(self._pipeline, given[name], is_cleaned=is_cleaned)
        return given


def as_tokenized(pipeline: Any, prompts: str | list[str], *, is_cleaned: bool = False) -> str | list[str]:
    """Prompts as a pipeline gives them to its tokenizer: PixArt, Sana and their kin take capitals out of them first.

    Args:
        pipeline: of diffusers.
        prompts: one, or several.
        is_cleaned: it was called with `clean_caption`.
    """
    rewrite = getattr(pipeline, "_text_preprocessing", None)
    if rewrite is None:
        return prompts
    from diffusers.utils.import_utils import is_bs4_available, is_ftfy_available

    # Without these packages it warns, and cleans nothing.
    return rewrite(prompts, clean_caption=is_cleaned and is_bs4_available() and is_ftfy_available())


@dataclass(frozen=True, eq=False)
class Encoded:
    """A text and what it became.

    Attributes:
        states: [L, C]; of the real tokens only, where padding is masked.
        text: the text; None for a negative prompt that was given as embeddings.
        others: the texts for a pipeline's further encoders (`prompt_2`, `prompt_3`), where one of them is another one.
        is_prompt: it was encoded as a prompt.
        is_negative: it was encoded as a negative prompt, or as either.
    """

    states: Tensor
    text: str | None
    others: tuple[str, ...] = ()
    is_prompt: bool = True
    is_negative: bool = False


class PromptMemory:
    """The texts that a pipeline has encoded, the last ones of them."""

    def __init__(self) -> None:
        self._encoded: list[Encoded] = []

    def note(self, arguments: dict[str, Any], result: Any) -> None:
        """Remember what `encode_prompt` made of its arguments."""
        prompts = listed(arguments.get("prompt")) or []
        if isinstance(result, tuple):
            found = _of_halves(arguments, prompts, result)
        else:  # ours encodes prompts and negative prompts alike
            found = []
            for number, (states, text) in enumerate(zip(result.states, prompts, strict=True)):
                length = len(states) if result.key_mask is None else int(result.key_mask[number].sum())
                found.append(Encoded(states[:length], text, is_negative=True))
        for encoded in found:
            if encoded.text is not None or not self._knows_negative(encoded.states):
                self._add(encoded)
        sizes = [encoded.states.nbytes for encoded in self._encoded]
        first = max(0, len(sizes) - MOST_TEXTS)
        while sum(sizes[first:]) > MOST_BYTES:
            first += 1
        del self._encoded[: min(first, max(0, len(sizes) - len(found)))]

    def _add(self, new: Encoded) -> None:
        for number, known in enumerate(self._encoded):
            kinds = known.text, known.others, known.is_prompt, known.is_negative
            if kinds == (new.text, new.others, new.is_prompt, new.is_negative) and _is_same(known.states, new.states):
                self._encoded.append(self._encoded.pop(number))
                return
        # A copy, so that a row does not keep its whole batch.
        kept = new.states.detach().clone()
        self._encoded.append(Encoded(kept, new.text, new.others, new.is_prompt, new.is_negative))

    def find(self, row: Tensor, *, is_negative: bool) -> Encoded | None:
        """What a row [Lk, C] is, newest first; of a prompt that was also a negative one, the one that is meant."""
        same = [
            encoded
            for encoded in reversed(self._encoded)
            if len(encoded.states) <= len(row) and _is_same(encoded.states, row[: len(encoded.states)])
        ]
        meant = [each for each in same if (each.is_negative if is_negative else each.is_prompt)]
        return next(iter(meant or same), None)

    def _knows_negative(self, row: Tensor) -> bool:
        known = self.find(row, is_negative=True)
        return known is not None and known.is_negative

    def knows_width(self, width: int) -> bool:
        """Whether texts with so many channels were encoded."""
        return any(encoded.states.shape[-1] == width for encoded in self._encoded)


def _of_halves(arguments: dict[str, Any], prompts: list[str], result: tuple[Any, ...]) -> list[Encoded]:
    """The texts of an `encode_prompt` that returns prompts first and negative prompts somewhere behind them."""
    first = result[0]
    if not isinstance(first, Tensor) or first.dim() != 3:
        return []
    found: list[Encoded] = []
    if prompts and len(first) % len(prompts) == 0:  # else the caller's own embeddings, or those of an earlier call
        repeats = len(first) // len(prompts)
        others = [listed(arguments.get(name)) or prompts for name in ("prompt_2", "prompt_3")]
        for number, (row, text) in enumerate(zip(first.detach()[::repeats], prompts, strict=True)):
            own = tuple(texts[number] if len(texts) == len(prompts) else text for texts in others)
            found.append(Encoded(row, text, () if own == (text, text) else own))
    negatives = next((each for each in result[1:] if _is_like(each, first)), None)
    if negatives is not None:
        given = arguments.get("negative_prompt_embeds") is not None
        texts = [None] if given else listed(arguments.get("negative_prompt")) or [""]
        repeats = max(1, len(negatives) // len(texts))
        for number, row in enumerate(negatives.detach()):
            found.append(Encoded(row, texts[min(number // repeats, len(texts) - 1)], (), False, True))
    return found


def _is_like(other: Any, first: Tensor) -> bool:
    return (
        isinstance(other, Tensor)
        and other.dim() == 3
        and other.is_floating_point()
        and other.shape[2] == first.shape[2]
    )


def _is_same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one.to(other), other)


def listed(text: Any) -> list[str] | None:
    """One text or several as a list; None stays None."""
    return None if text is None else [text] if isinstance(text, str) else list(text)
