"""Joint attention: text and picture in one softmax, and which part of it shows where words are.

The queries of the picture's places against the keys of the text's tokens. As the picture's places attend to each other
too, a place's weights over the text sum to the share that it gives to the text.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from mmattn.errors import UsageError
from mmattn.maps.capture import SeenAttention

# Classes of processors by what comes first in their queries and keys.
_PICTURE_FIRST = ("JointAttnProcessor2_0", "FusedJointAttnProcessor2_0")
_TEXT_FIRST = ("FluxAttnProcessor", "FluxIPAdapterAttnProcessor")


def is_text_first(module: nn.Module) -> bool | None:
    """Whether the text stands before the picture in a layer of joint attention; None: not known."""
    classes = {each.__name__ for each in type(getattr(module, "processor", None)).__mro__}
    if classes.intersection(_PICTURE_FIRST):
        return False
    return True if classes.intersection(_TEXT_FIRST) else None


def check_joint(name: str, module: nn.Module) -> None:
    """Raise `UsageError` for a layer of joint attention whose parts cannot be told apart."""
    if is_text_first(module) is None:
        processor: Any = getattr(module, "processor", None)
        raise UsageError(
            f"record_attention: {name} attends to text and picture in one softmax, and in which order they stand under "
            f"{type(processor).__name__} is not known; known are {', '.join((*_PICTURE_FIRST, *_TEXT_FIRST))}"
        )


def picture_part(module: nn.Module, seen: SeenAttention, text_length: int, places: int) -> tuple[SeenAttention, int]:
    """The queries of the picture's places, and where the text's keys begin.

    Args:
        module: the layer.
        seen: its joint attention.
        text_length: tokens of the text.
        places: of the picture that is drawn, where the text comes first; places of given pictures (FLUX.1 Kontext)
            come after them.

    Raises:
        UsageError: the calls of the layer are no joint attention over so many tokens.
    """
    _, length, num_keys = seen.sizes
    if length != num_keys or text_length >= length:
        raise UsageError(
            f"record_attention: {type(module).__name__} made a call of {length} queries and {num_keys} keys, which is "
            f"no joint attention of a picture and {text_length} tokens"
        )
    is_first = is_text_first(module)
    part = slice(text_length, text_length + places) if is_first else slice(0, length - text_length)
    cut = {
        name: None if whole is None else whole[:, :, part]
        for name, whole in (
            ("query", seen.query),
            ("log_sum_exp", seen.log_sum_exp),
            ("weights", seen.weights),
            ("mask", seen.mask if seen.mask is not None and seen.mask.shape[2] > 1 else None),
        )
    }
    if cut["mask"] is None:
        cut["mask"] = seen.mask
    return replace(seen, maps=None, **cut), 0 if is_first else length - text_length
