"""Prompts as the embeddings that a pipeline takes, encoded once for any number of pictures."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmattn.errors import UsageError
from mmattn.inference.diffusion.checks import each_prompt, expected_width
from mmattn.inference.diffusion.pixel_pipeline import PixelPipeline, mask_of, pad_length
from mmattn.inference.diffusion.prompt_tokens import cut_message
from mmattn.inference.diffusion.sd_text_encoding import PipelineTextEncoding

_log = logging.getLogger(__name__)

_AT_ONCE = 32  # prompts that go through the text encoder together
_STOCK_NAMES = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
_NEGATIVE = "negative_"
# Ours says the same in one line, and for every prompt by itself.
_CUT_MESSAGES = ("The following part of your input was truncated", "Token indices sequence length is longer")


@dataclass(frozen=True, eq=False)
class EncodedPrompts:
    """What `TextToImage.encode` returns: any number of pictures start from it without the text encoder.

    Attributes:
        prompts: the texts.
        tensors: arguments of the pipeline by name, a row for each prompt; those of guidance begin with "negative_".
        has_negative: negative prompts were given.
        negatives: those, one for each prompt; empty without.
    """

    prompts: tuple[str, ...]
    tensors: dict[str, Tensor]
    has_negative: bool
    negatives: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def is_guided(self) -> bool:
        """Whether the other half of guidance is there."""
        return any(name.startswith(_NEGATIVE) for name in self.tensors)

    def texts(self, numbers: Sequence[int]) -> tuple[list[str], list[str] | None]:
        """Prompts and negative prompts of these numbers; None where none were given."""
        negatives = [self.negatives[number] for number in numbers] if self.negatives else None
        return [self.prompts[number] for number in numbers], negatives

    def rows(self, numbers: Sequence[int], *, is_guided: bool) -> dict[str, Tensor]:
        """The pipeline's arguments for the prompts of these numbers, without guidance's half where it is not used."""
        return {
            name: tensor[torch.tensor(numbers, device=tensor.device)]
            for name, tensor in self.tensors.items()
            if is_guided or not name.startswith(_NEGATIVE)
        }


def encode_prompts(
    pipeline: Any, prompts: str | Sequence[str], negative_prompts: str | Sequence[str] | None, *, is_guided: bool
) -> EncodedPrompts:
    """Run the text encoders, and say of each prompt that is too long what was cut off.

    Args:
        pipeline: a `PixelPipeline`, or Stable Diffusion of any version.
        prompts: one or several.
        negative_prompts: one for all or one for each prompt; None: the pipeline's own (the empty text, or zeros).
        is_guided: encode guidance's half too.

    Raises:
        UsageError: no prompts, something that is no text, or another number of negative prompts.
    """
    texts = each_prompt(prompts)
    negatives = None if negative_prompts is None else each_negative(negative_prompts, len(texts))
    encode = _encode_for_pixels
    if not isinstance(pipeline, PixelPipeline):  # whose tokenizer says it itself
        say_what_is_cut(pipeline, [*texts, *(negatives or [])])
        encode = _encode_for_stock
    parts = []
    with _without_stock_message(pipeline):
        for start in range(0, len(texts), _AT_ONCE):
            rows = slice(start, start + _AT_ONCE)
            parts.append(encode(pipeline, texts[rows], negatives and negatives[rows], is_guided=is_guided))
    tensors = {name: torch.cat(_same_length([part[name] for part in parts])) for name in parts[0]}
    return EncodedPrompts(tuple(texts), tensors, negatives is not None, tuple(negatives or ()))


def check_encoded(encoded: EncodedPrompts, unet: Any, *, is_guided: bool) -> None:
    """Raise `UsageError` for prompts that another model's text encoder made."""
    width, expected = encoded.tensors["prompt_embeds"].shape[-1], expected_width(unet)
    if width != expected:
        raise UsageError(f"these prompts were encoded by another model: width {width}, but the U-Net reads {expected}")
    if is_guided and not encoded.is_guided:
        raise UsageError("these prompts were encoded by another model, without what guidance needs: encode them again")


def each_negative(negative_prompts: str | Sequence[str], count: int) -> list[str]:
    """A negative prompt for each prompt.

    Raises:
        UsageError: another number of them, or something that is no text.
    """
    given = each_prompt(negative_prompts, "negative_prompts")
    if isinstance(negative_prompts, str):
        return given * count
    if len(given) != count:
        raise UsageError(f"{len(given)} negative_prompts for {count} prompts: give one, or one for each")
    return given


def say_what_is_cut(pipeline: Any, prompts: Sequence[str]) -> None:
    """Warn, once for each prompt, of words for which Stable Diffusion's text encoders have no room.

    Raises:
        CheckpointError: a pipeline without text encoders.
    """
    encoding = PipelineTextEncoding(pipeline)
    distinct = list(dict.fromkeys(prompts))
    for prompt, cut in zip(distinct, encoding.cut(distinct), strict=True):
        if cut is not None:
            _log.warning("%s", cut_message(prompt, cut, encoding.max_length))


def _encode_for_pixels(
    pipeline: PixelPipeline, prompts: list[str], negatives: list[str] | None, *, is_guided: bool
) -> dict[str, Tensor]:
    texts = {"": prompts}
    if is_guided:
        texts[_NEGATIVE] = [""] * len(prompts) if negatives is None else negatives
    tensors = {}
    for prefix, rows in texts.items():
        encoded = pipeline.encode_prompt(rows)
        tensors |= {f"{prefix}prompt_embeds": encoded.states, f"{prefix}prompt_attention_mask": mask_of(encoded)}
    return tensors


def _encode_for_stock(
    pipeline: Any, prompts: list[str], negatives: list[str] | None, *, is_guided: bool
) -> dict[str, Tensor]:
    encoded = pipeline.encode_prompt(
        prompt=prompts,
        device=pipeline._execution_device,
        num_images_per_prompt=1,
        do_classifier_free_guidance=is_guided,
        negative_prompt=negatives,
    )
    named = zip(_STOCK_NAMES, encoded, strict=False)  # Stable Diffusion 1 and 2 have no pooled embeddings
    return {
        name: tensor for name, tensor in named if tensor is not None and (is_guided or not name.startswith(_NEGATIVE))
    }


def _same_length(parts: list[Tensor]) -> list[Tensor]:
    """Tensors of several batches with their texts padded to one length; pooled embeddings have one length anyway."""
    length = max(part.shape[1] for part in parts)
    return [pad_length(part, length) for part in parts]


@contextlib.contextmanager
def _without_stock_message(pipeline: Any) -> Iterator[None]:
    """Keep the libraries from saying, less clearly, what `say_what_is_cut` has said."""

    def is_news(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(_CUT_MESSAGES)

    loggers = [logging.getLogger(name) for name in (type(pipeline).__module__, "transformers.tokenization_utils_base")]
    for logger in loggers:
        logger.addFilter(is_news)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(is_news)
