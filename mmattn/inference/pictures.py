"""Pictures on their way in: opened from whatever the caller has, and encoded once for any number of texts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from PIL import Image

from mmattn.data.images import open_image
from mmattn.errors import UsageError
from mmattn.inference.origins import Origin
from mmattn.models.vlm.text import LayerContexts
from mmattn.ops.cache import ContextKV

ImageInput: TypeAlias = Image.Image | str | Path | bytes | np.ndarray


def open_images(
    images: ImageInput | Sequence[ImageInput], *, keep: Callable[[Image.Image], Image.Image] | None = None
) -> tuple[list[Image.Image], bool]:
    """RGB pictures, and whether a single one was given rather than a list of them.

    Args:
        images: a Pillow picture, a file's path or bytes, or a uint8 array `[H, W]`, `[H, W, 3]` or `[H, W, 4]`;
            or a list of these; or an array `[N, H, W, 3]`.
        keep: what of a picture shall stay in memory, made before the next one is opened; None: all of it.

    Raises:
        DataError: a picture that is missing, damaged or too large (named).
        UsageError: something that is no picture at all, an empty list, or a URL.
    """
    if isinstance(images, np.ndarray) and images.ndim == 4:
        images = list(images)
    if isinstance(images, list | tuple):
        if not images:
            raise UsageError("no pictures were given: the list is empty")
        opened = (_open(image, f"picture {index}") for index, image in enumerate(images))
        return [image if keep is None else keep(image) for image in opened], False
    image = _open(images, "the picture")  # type: ignore[arg-type]
    return [image if keep is None else keep(image)], True


def _open(image: ImageInput, name: str) -> Image.Image:
    # Of a path one of the two strokes is left.
    if isinstance(image, str | Path) and str(image).startswith(("http:/", "https:/")):
        raise UsageError(f"{name} is a URL, {image}: download it and pass the file")
    if isinstance(image, str | Path):
        return open_image(image)
    if isinstance(image, Image.Image | bytes | np.ndarray):
        return open_image(image, name=name)
    raise UsageError(
        f"{name} is a {type(image).__name__}: give a Pillow picture, a path, bytes, or a uint8 array [H, W, 3]"
    )


@dataclass(frozen=True, eq=False)
class Pictures:
    """Encoded pictures: features and the keys and values that the texts attend to, made once per picture.

    The caller holds them and may ask and caption as often as it likes; beams and questions share them. Index with a
    number, a slice or a list of numbers for some of them.

    Attributes:
        features: image encoder output `[B, Lk, C]`.
        contexts: keys and values of each text layer that attends to the picture, None for the others.
        images: the RGB pictures themselves, for drawing attention maps on.
        is_single: made from one picture that was not in a list; results then come without a list as well.
        origin: stands for the network that encoded them; None: not known.
    """

    features: torch.Tensor
    contexts: LayerContexts
    images: tuple[Image.Image, ...]
    is_single: bool = False
    origin: Origin | None = None

    def __len__(self) -> int:
        return self.features.shape[0]

    def __getitem__(self, index: int | slice | Sequence[int]) -> Pictures:
        numbers = range(len(self))
        if isinstance(index, slice):
            return self.select(list(numbers[index]))
        is_one = not isinstance(index, Iterable)
        wanted = list(index) if isinstance(index, Iterable) else [index]
        if any(isinstance(number, bool | np.bool_) for number in wanted):
            raise UsageError("pictures are chosen by their numbers, a number, a slice or a list of them, not by True")
        return self.select([numbers[number] for number in wanted], is_single=is_one)

    def __iter__(self) -> Iterator[Pictures]:
        return (self[index] for index in range(len(self)))

    def select(self, numbers: Sequence[int], *, is_single: bool = False) -> Pictures:
        """The pictures of these numbers, copied unless they are all of them."""
        if list(numbers) == list(range(len(self))) and is_single == self.is_single:
            return self
        rows = torch.tensor(numbers, dtype=torch.long, device=self.features.device)
        contexts = tuple(None if context is None else context.select(rows) for context in self.contexts)
        images = tuple(self.images[number] for number in numbers)
        return Pictures(self.features.index_select(0, rows), contexts, images, is_single, self.origin)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Pictures:
        """The same pictures on another device or in another dtype: those of the model that shall take them."""
        contexts = tuple(None if context is None else context.to(device, dtype) for context in self.contexts)
        features = self.features.to(device=device, dtype=dtype)
        return Pictures(features, contexts, self.images, self.is_single, self.origin)

    @property
    def nbytes(self) -> int:
        """Bytes of features, keys and values on the model's device; the pictures themselves are not counted."""
        return self.features.nbytes + sum(context.nbytes for context in self.contexts if context is not None)

    def __repr__(self) -> str:
        return f"Pictures({len(self)} x {self.features.shape[1]} features, {self.nbytes / 2**20:.1f} MiB)"


def join(parts: Sequence[Pictures], *, is_single: bool) -> Pictures:
    """Pictures encoded in several batches as one."""
    if len(parts) == 1 and parts[0].is_single == is_single:
        return parts[0]
    contexts = [
        None
        if layer[0] is None
        else ContextKV(torch.cat([context.key for context in layer]), torch.cat([context.value for context in layer]))
        for layer in zip(*(part.contexts for part in parts), strict=True)
    ]
    images = tuple(image for part in parts for image in part.images)
    features = torch.cat([part.features for part in parts])
    return Pictures(features, tuple(contexts), images, is_single, parts[0].origin)
