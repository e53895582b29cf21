"""What every image-text data set hands out, whatever it was read from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np


@dataclass(frozen=True)
class TextItem:
    """One text on a picture: a caption, or the answer to a question.

    Args:
        text: The caption or the answer: what a model is scored on.
        question: The question that `text` answers; None for a caption.
        kind: What sort of text it is ("caption", "color", "relation", ...), for scores by kind.
    """

    text: str
    question: str | None = None
    kind: str = "caption"


@dataclass(frozen=True, eq=False)
class ImageTextRecord:
    """A picture with its texts.

    Args:
        id: Names the record in messages and results; stable between runs.
        image: uint8 [H, W, 3].
        texts: At least one text.
        extra: Whatever else the source knows (a scene, a file's columns).
    """

    id: str
    image: np.ndarray
    texts: tuple[TextItem, ...]
    extra: dict[str, Any] = field(default_factory=dict)


@runtime_checkable
class ImageTextSource(Protocol):
    """A data set of pictures with texts; `source[i]` is the same record whenever it is asked for."""

    @property
    def name(self) -> str:
        """Names the data set in messages."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> ImageTextRecord: ...


@runtime_checkable
class BatchedSource(ImageTextSource, Protocol):
    """A source that makes many records at once faster than one by one."""

    def records(self, indices: Sequence[int]) -> list[ImageTextRecord]:
        """`[self[i] for i in indices]`."""
        ...


def read_records(source: ImageTextSource, indices: Sequence[int]) -> list[ImageTextRecord]:
    """`[source[i] for i in indices]`, in one call where the source can."""
    if isinstance(source, BatchedSource):
        return source.records(indices)
    return [source[index] for index in indices]


@runtime_checkable
class TextSource(Protocol):
    """A source that knows its texts without opening pictures."""

    def texts(self, indices: Sequence[int]) -> list[tuple[TextItem, ...]]:
        """`[self[i].texts for i in indices]`."""
        ...


def read_texts(source: ImageTextSource, indices: Sequence[int]) -> list[tuple[TextItem, ...]]:
    """`[source[i].texts for i in indices]`, without opening pictures where the source can."""
    if isinstance(source, TextSource):
        return source.texts(indices)
    return [source[index].texts for index in indices]
