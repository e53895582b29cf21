"""What is in a scene and where: drawn at random, for many scenes at once, from (seed, split, index).

The object named first in a caption is decided by what the objects are (colour, then shape, in alphabetical
order), never by where they are. Places are drawn afterwards, so the direction of a relation can be learned from
the picture alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mmattn.data.draws import uniform_rows
from mmattn.errors import UsageError

COLORS = ("blue", "green", "orange", "pink", "purple", "red", "turquoise", "yellow")
SHAPES = ("circle", "cross", "diamond", "ring", "square", "triangle")
SIZES = ("small", "large")
RELATIONS = ("left of", "right of", "above", "below")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
SPLITS = ("train", "validation", "test", "heldout")

PALETTE = np.array(
    [
        (40, 70, 225),  # blue
        (30, 145, 50),  # green
        (250, 135, 20),  # orange
        (250, 125, 190),  # pink
        (130, 45, 180),  # purple
        (220, 30, 40),  # red
        (40, 205, 205),  # turquoise
        (250, 225, 40),  # yellow
    ],
    dtype=np.float32,
)

# A fifth of the 48 pairs. Every colour misses one or two shapes and every shape one or two colours, so that each
# is still seen in training with at least four partners.
HELD_OUT_PAIRS = frozenset(
    {
        ("blue", "ring"),
        ("blue", "triangle"),
        ("green", "circle"),
        ("orange", "square"),
        ("pink", "cross"),
        ("purple", "diamond"),
        ("red", "triangle"),
        ("red", "cross"),
        ("turquoise", "ring"),
        ("yellow", "square"),
    }
)
ALL_PAIRS = tuple((color, shape) for color in COLORS for shape in SHAPES)
TRAINED_PAIRS = tuple(pair for pair in ALL_PAIRS if pair not in HELD_OUT_PAIRS)
_HELD_OUT_ORDERED = tuple(pair for pair in ALL_PAIRS if pair in HELD_OUT_PAIRS)

# Half the width of an object, as a fraction of the picture's side.
RADII = {"small": (0.115, 0.135), "large": (0.19, 0.215)}
MARGIN = 0.015
GAP = 0.05  # more than a pixel of background between objects at 32 px
CLEAR_RATIO = 0.5  # a relation is clear when the other axis moves at most half as far

_OBJECT_COUNTS = {1: (1.0,), 2: (0.4, 0.6), 3: (0.25, 0.4, 0.35)}
_TRIES = 16
_MAX_ROUNDS = 500


@dataclass(frozen=True)
class SceneObject:
    """One coloured shape. `x`, `y` (centre, down is positive) and `radius` are fractions of the picture's side."""

    color: str
    shape: str
    size: str
    x: float
    y: float
    radius: float
    rgb: tuple[float, float, float]

    @property
    def pair(self) -> tuple[str, str]:
        """(colour, shape), which no other object of the scene shares."""
        return (self.color, self.shape)


@dataclass(frozen=True)
class Scene:
    """One to three objects in the order in which captions name them, and the numbers that make the background."""

    objects: tuple[SceneObject, ...]
    background: tuple[float, ...]

    @property
    def has_held_out_pair(self) -> bool:
        """Whether an object has a colour and shape that training never shows together."""
        return any(item.pair in HELD_OUT_PAIRS for item in self.objects)


def relation_of(first: SceneObject, second: SceneObject) -> str | None:
    """Where `first` is, seen from `second`; None when neither axis clearly dominates."""
    across, down = first.x - second.x, first.y - second.y
    main, other = max(abs(across), abs(down)), min(abs(across), abs(down))
    if main < first.radius + second.radius or other > CLEAR_RATIO * main:
        return None
    if abs(across) > abs(down):
        return "left of" if across < 0 else "right of"
    return "above" if down < 0 else "below"


def draw_scenes(seed: int, split: str, indices: Sequence[int], max_objects: int) -> list[Scene]:
    """The scenes with these indices: a pure function of the arguments, scene by scene.

    Raises:
        UsageError: an unknown split, or `max_objects` outside 1 to 3.
    """
    if split not in SPLITS:
        raise UsageError(f"unknown scenes split {split!r}: use one of {', '.join(SPLITS)}")
    if max_objects not in _OBJECT_COUNTS:
        raise UsageError(f"max_objects must be 1, 2 or 3, not {max_objects}")
    rows = uniform_rows(seed, f"scenes/{split}/{max_objects}/what", indices, 32)
    counts = np.searchsorted(np.cumsum(_OBJECT_COUNTS[max_objects])[:-1], rows[:, 0], side="right") + 1
    drawn = [_draw_objects(row, int(count), split) for row, count in zip(rows.tolist(), counts, strict=True)]
    radii = np.zeros((len(drawn), 3))
    for position, objects in enumerate(drawn):
        radii[position, : len(objects)] = [item[2] for item in objects]
    places = _draw_places(seed, f"scenes/{split}/{max_objects}/where", np.asarray(indices), counts, radii).tolist()
    return [
        Scene(
            tuple(
                SceneObject(color, shape, size, place[0], place[1], radius, rgb)
                for ((color, shape), size, radius, rgb), place in zip(objects, row_places, strict=False)
            ),
            tuple(row[20:32]),
        )
        for objects, row_places, row in zip(drawn, places, rows.tolist(), strict=True)
    ]


def _draw_objects(row: list[float], count: int, split: str) -> list[tuple]:
    """((colour, shape), size, radius, rgb) for each object, all pairs different, in caption order."""
    pairs: list[tuple[str, str]] = []
    for position in range(count):
        choices = _HELD_OUT_ORDERED if split == "heldout" and position == 0 else TRAINED_PAIRS
        left = choices if not pairs else [pair for pair in choices if pair not in pairs]
        pairs.append(left[int(row[1 + position] * len(left))])
    pairs.sort()
    objects = []
    for position, pair in enumerate(pairs):
        if count < 3:
            size = SIZES[int(row[4 + position] * 2)]
        else:  # more than one large object leaves too few places with clear relations
            size = SIZES[int(row[4] * 4) == position]
        low, high = RADII[size]
        radius = low + (high - low) * row[7 + position]
        red, green, blue = (24 * row[10 + 3 * position + channel] - 12 for channel in range(3))
        base = _PALETTE_OF[pair[0]]
        objects.append((pair, size, radius, (base[0] + red, base[1] + green, base[2] + blue)))
    return objects


_PALETTE_OF = {color: tuple(PALETTE[position].tolist()) for position, color in enumerate(COLORS)}


def _draw_places(seed: int, purpose: str, indices: np.ndarray, counts: np.ndarray, radii: np.ndarray) -> np.ndarray:
    """Centres [N, 3, 2] by rejection: apart from each other, and clear relations with the first object."""
    places = np.zeros((len(indices), 3, 2))
    todo = np.arange(len(indices))
    for attempt in range(_MAX_ROUNDS):
        draws = uniform_rows(seed, f"{purpose}/{attempt}", indices[todo], 6 * _TRIES).reshape(-1, _TRIES, 3, 2)
        inset = radii[todo][:, None, :, None] + MARGIN
        candidates = inset + draws * (1 - 2 * inset)
        good = _is_good(candidates, radii[todo], counts[todo])
        found = good.any(axis=1)
        places[todo[found]] = candidates[found, good[found].argmax(axis=1)]
        todo = todo[~found]
        if not len(todo):
            return places
    raise AssertionError("a scene could not be placed")


def _is_good(candidates: np.ndarray, radii: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Which of the tries [N, tries, 3, 2] may be used: bool [N, tries]."""
    good = np.ones(candidates.shape[:2], dtype=bool)
    for first, second in ((0, 1), (0, 2), (1, 2)):
        offset = np.abs(candidates[:, :, first] - candidates[:, :, second])
        main, other = offset.max(axis=-1), offset.min(axis=-1)
        fits = main >= (radii[:, first] + radii[:, second] + GAP)[:, None]
        if first == 0:
            fits &= other <= CLEAR_RATIO * main
        good &= fits | (counts <= second)[:, None]
    return good
