"""Reads a scene back from its pixels: colour, shape, size and place of every object, and what relations hold.

Works by looking, not by knowing how the picture was made, so that generated pictures can be scored with it.
Objects are what is more colourful than the background; a shape is the one whose drawing fits best.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from mmattn.data.scenes.layout import COLORS, PALETTE, RADII, RELATIONS, SHAPES, SIZES, SceneObject
from mmattn.data.scenes.render import DISTANCES

_SIZE_LIMIT = (RADII["small"][1] + RADII["large"][0]) / 2
_CHROMA = 62.0  # backgrounds stay under half of it; a pixel half covered by the palest colour is above
_SMALLEST = RADII["small"][0] / 2
_PHRASE = re.compile(rf"\b(?:an?|the) ({'|'.join(SIZES)}) ({'|'.join(COLORS)}) ({'|'.join(SHAPES)})\b")
_RELATION = re.compile(rf"\b({'|'.join(RELATIONS)})\b")


@dataclass(frozen=True)
class Claim:
    """What a caption says: objects as (size, colour, shape), and relations of the first to the others."""

    objects: tuple[tuple[str, str, str], ...]
    relations: tuple[str, ...]


@dataclass(frozen=True)
class Verdict:
    """How a picture agrees with a caption. `shapes` is colour and shape together, `outlines` the shapes alone;
    `relations` is None for captions without one."""

    count: bool
    colors: bool
    outlines: bool
    shapes: bool
    sizes: bool
    relations: bool | None

    @property
    def is_right(self) -> bool:
        """Whether everything agrees."""
        return self.count and self.colors and self.shapes and self.sizes and self.relations is not False


def parse_caption(caption: str) -> Claim | None:
    """What a canonical caption says; None when it is not one."""
    objects = tuple((size, color, shape) for size, color, shape in _PHRASE.findall(caption))
    relations = tuple(_RELATION.findall(caption))
    return Claim(objects, relations) if objects and len(relations) == len(objects) - 1 else None


def check_caption(image: np.ndarray, caption: str) -> Verdict:
    """Whether a picture, uint8 [S, S, 3], shows what a canonical caption says.

    Raises:
        ValueError: the caption is not a canonical one.
    """
    claim = parse_caption(caption)
    if claim is None:
        raise ValueError(f"not a canonical caption: {caption!r}")
    seen = read_objects(image)
    wanted = claim.objects
    matched = [next((item for item in seen if (item.size, item.color, item.shape) == want), None) for want in wanted]
    return Verdict(
        count=len(seen) == len(wanted),
        colors=sorted(item.color for item in seen) == sorted(color for _, color, _ in wanted),
        outlines=sorted(item.shape for item in seen) == sorted(shape for _, _, shape in wanted),
        shapes=sorted((item.color, item.shape) for item in seen)
        == sorted((color, shape) for _, color, shape in wanted),
        sizes=sorted((item.color, item.shape, item.size) for item in seen)
        == sorted((color, shape, size) for size, color, shape in wanted),
        relations=_relations_hold(claim, matched) if claim.relations else None,
    )


def _relations_hold(claim: Claim, matched: list[SceneObject | None]) -> bool:
    first, *others = matched
    return all(
        first is not None and other is not None and _dominant_relation(first, other) == relation
        for relation, other in zip(claim.relations, others, strict=True)
    )


def _dominant_relation(first: SceneObject, second: SceneObject) -> str:
    """By the longer way alone: a place is read to half a pixel, so what is just clear must not be lost."""
    across, down = first.x - second.x, first.y - second.y
    if abs(across) > abs(down):
        return "left of" if across < 0 else "right of"
    return "above" if down < 0 else "below"


def read_objects(image: np.ndarray) -> tuple[SceneObject, ...]:
    """The objects in a picture, uint8 [S, S, 3], in the order in which captions name them."""
    pixels = image.astype(np.float32)
    chroma = pixels.max(axis=-1) - pixels.min(axis=-1)
    labels = _components(chroma > _CHROMA)
    found = []
    for label in range(1, labels.max(initial=0) + 1):
        item = _read_object(pixels, chroma, labels == label)
        if item is not None:
            found.append(item)
    return tuple(sorted(found, key=lambda item: item.pair))


def _components(mask: np.ndarray) -> np.ndarray:
    """Numbers the 4-connected parts of a mask from 1: int [S, S], 0 outside."""
    labels = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:
        spread = labels.copy()
        for axis in (0, 1):
            for step in (1, -1):
                moved = np.roll(labels, step, axis)
                edge = (0 if step == 1 else -1,)
                moved[edge if axis == 0 else (slice(None), *edge)] = 0
                spread = np.maximum(spread, moved)
        spread[~mask] = 0
        if np.array_equal(spread, labels):
            return np.unique(labels, return_inverse=True)[1].reshape(mask.shape) if not mask.all() else mask.astype(int)
        labels = spread


def _read_object(pixels: np.ndarray, chroma: np.ndarray, part: np.ndarray) -> SceneObject | None:
    side = part.shape[0]
    rows, columns = np.flatnonzero(part.any(axis=1)), np.flatnonzero(part.any(axis=0))
    radius = max(rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1) / (2 * side)
    if radius < _SMALLEST or part.all():
        return None
    inner = chroma >= np.quantile(chroma[part], 0.6)
    rgb = np.median(pixels[part & inner], axis=0)
    color = COLORS[int(((PALETTE - rgb) ** 2).sum(axis=-1).argmin())]
    cover, top, left = _cover(pixels, part, rgb)
    shape, x, y, radius = _best_fit(cover, top, left, side, rows, columns)
    size = "small" if radius < _SIZE_LIMIT else "large"
    return SceneObject(color, shape, size, x, y, radius, (float(rgb[0]), float(rgb[1]), float(rgb[2])))


def _cover(pixels: np.ndarray, part: np.ndarray, rgb: np.ndarray) -> tuple[np.ndarray, int, int]:
    """How far the pixels around a part go from the background to its colour, 0 to 1, and where that window starts."""
    rows, columns = np.flatnonzero(part.any(axis=1)), np.flatnonzero(part.any(axis=0))
    top, left = max(0, rows[0] - 2), max(0, columns[0] - 2)
    window = pixels[top : rows[-1] + 3, left : columns[-1] + 3]
    inside = part[top : rows[-1] + 3, left : columns[-1] + 3]
    rim = ~_grown(inside)
    if not rim.any():
        rim = ~inside
    ground = np.median(window[rim], axis=0)
    way = rgb - ground
    cover = np.clip((window - ground) @ way / max(float(way @ way), 1.0), 0, 1)
    # Another object nearby is no part of this one.
    cover[~_grown(inside)] = 0
    return cover, int(top), int(left)


def _grown(mask: np.ndarray) -> np.ndarray:
    padded = np.pad(mask, 1)
    height, width = mask.shape
    moved = [padded[down : down + height, across : across + width] for down in range(3) for across in range(3)]
    return np.logical_or.reduce(moved)


def _best_fit(
    cover: np.ndarray, top: int, left: int, side: int, rows: np.ndarray, columns: np.ndarray
) -> tuple[str, float, float, float]:
    """The shape, centre and radius whose drawing comes closest to the cover (least squares, to half a pixel)."""
    middle_y, middle_x = (rows[0] + rows[-1] + 1) / (2 * side), (columns[0] + columns[-1] + 1) / (2 * side)
    extent = max(rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1) / (2 * side)
    offsets = np.array((-0.5, 0.0, 0.5)) / side
    scales = extent + np.array((-0.75, -0.25, 0.25, 0.75, 1.25)) / side  # pointed tips are too pale to be counted
    best = (np.inf, SHAPES[0], middle_x, middle_y, extent)
    grid = np.stack(np.meshgrid(offsets, offsets, scales, indexing="ij"), axis=-1).reshape(-1, 3)
    x, y, radius = middle_x + grid[:, :1, None], middle_y + grid[:, 1:2, None], grid[:, 2:, None]
    across = ((left + np.arange(cover.shape[1]) + 0.5) / side - x) / radius
    down = ((top + np.arange(cover.shape[0]) + 0.5) / side - y.transpose(0, 2, 1)) / radius
    for shape, distance in DISTANCES.items():
        drawn = np.clip(0.5 - distance(across, down.transpose(0, 2, 1)) * radius * side, 0, 1)
        errors = ((drawn - cover) ** 2).sum(axis=(1, 2))
        place = int(errors.argmin())
        if errors[place] < best[0]:
            center = float(x[place, 0, 0]), float(y[place, 0, 0])
            best = (float(errors[place]), shape, *center, float(radius[place, 0, 0]))
    return best[1:]
