"""Scenes as a data set: pictures, captions, questions and regions, made when asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mmattn.data.draws import uniform_rows
from mmattn.data.records import ImageTextRecord, TextItem
from mmattn.data.scenes import grammar, questions
from mmattn.data.scenes.layout import SPLITS, Scene, draw_scenes
from mmattn.data.scenes.render import object_masks, render_scenes
from mmattn.errors import UsageError


@dataclass(frozen=True, eq=False)
class ObjectRegion:
    """The pixels of one object, and the caption's words that speak of it.

    Args:
        words: ("small", "red", "circle"): size, colour, shape.
        start: Position of `words[0]` among the caption's words (split at spaces).
        mask: bool [H, W].
    """

    words: tuple[str, str, str]
    start: int
    mask: np.ndarray


class SceneDataset:
    """Pictures of coloured shapes with captions and questions; an `ImageTextSource`.

    Record i is a pure function of (seed, split, i, max_objects); `image_size` changes only the number of pixels.

    Args:
        split: "train", "validation" and "test" show pairs of colour and shape that training shows; every "heldout"
            picture has one object whose pair training never shows.
        size: Number of pictures.
        seed: Other seeds give other pictures; the held-out pairs stay.
        image_size: Side in pixels, 24 or more.
        max_objects: 1, 2 or 3.
    """

    def __init__(
        self, split: str = "train", size: int = 10_000, seed: int = 0, image_size: int = 32, max_objects: int = 2
    ) -> None:
        if image_size < 24:
            raise UsageError(f"image_size {image_size} is too small to tell shapes apart: use 24 or more")
        if size < 1:
            raise UsageError(f"a scenes data set needs a size of 1 or more, not {size}")
        if split not in SPLITS:
            raise UsageError(f"unknown scenes split {split!r}: use one of {', '.join(SPLITS)}")
        if max_objects not in (1, 2, 3):
            raise UsageError(f"max_objects must be 1, 2 or 3, not {max_objects}")
        self.split, self.size, self.seed = split, size, seed
        self.image_size, self.max_objects = image_size, max_objects

    @property
    def name(self) -> str:
        """Names the data set in messages."""
        return f"scenes/{self.split}"

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> ImageTextRecord:
        return self.records([index])[0]

    def __iter__(self) -> Iterator[ImageTextRecord]:
        return (self[index] for index in range(self.size))

    def scenes(self, indices: Sequence[int]) -> list[Scene]:
        """What the pictures show."""
        for index in indices:
            if not 0 <= index < self.size:
                raise IndexError(f"{self.name} has {self.size} pictures, no number {index}")
        return draw_scenes(self.seed, self.split, indices, self.max_objects)

    def images(self, indices: Sequence[int]) -> np.ndarray:
        """The pictures: uint8 [N, H, W, 3]."""
        return render_scenes(self.scenes(indices), self.image_size)

    def texts(self, indices: Sequence[int]) -> list[tuple[TextItem, ...]]:
        """Caption and questions of each picture, without drawing it. The caption comes first."""
        return self._texts(indices, self.scenes(indices))

    def records(self, indices: Sequence[int]) -> list[ImageTextRecord]:
        """Pictures with their texts; `extra["scene"]` is the `Scene`."""
        scenes = self.scenes(indices)
        images = render_scenes(scenes, self.image_size)
        texts = self._texts(indices, scenes)
        return [
            ImageTextRecord(f"{self.name}/{index}", image, items, {"scene": scene})
            for index, image, items, scene in zip(indices, images, texts, scenes, strict=True)
        ]

    def regions(self, index: int) -> tuple[ObjectRegion, ...]:
        """Each object's pixels, in the order in which the canonical caption names them."""
        scene = self.scenes([index])[0]
        words = grammar.caption(scene).split()
        regions, start = [], 0
        for item, mask in zip(scene.objects, object_masks(scene, self.image_size), strict=True):
            start = words.index(item.size, start)
            regions.append(ObjectRegion((item.size, item.color, item.shape), start, mask))
            start += 1
        return tuple(regions)

    def _texts(self, indices: Sequence[int], scenes: Sequence[Scene]) -> list[tuple[TextItem, ...]]:
        draws = uniform_rows(self.seed, f"scenes/{self.split}/{self.max_objects}/ask", indices, questions.DRAWS)
        return [
            (TextItem(grammar.caption(scene)), *questions.questions(scene, row))
            for scene, row in zip(scenes, draws.tolist(), strict=True)
        ]
