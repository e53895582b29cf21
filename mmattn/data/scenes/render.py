"""Scenes to pixels, many at once: signed distances give smooth edges at any size, so shapes can be told at 32 px."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import numpy as np

from mmattn.data.scenes.layout import RADII, Scene, SceneObject

_NOISE_SIDE = 256


def _circle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.sqrt(x * x + y * y) - 1.0


def _ring(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.abs(np.sqrt(x * x + y * y) - 0.74) - 0.26


def _square(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(np.abs(x), np.abs(y)) - 0.92


def _diamond(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (np.abs(x) + np.abs(y) - 1.0) * math.sqrt(0.5)


def _cross(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x, y = np.abs(x), np.abs(y)
    return np.maximum(np.maximum(x, y) - 1.0, np.minimum(x, y) - 0.32)


def _triangle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    # Apex (0, -0.95), base from (-1, 0.8) to (1, 0.8): the sides' outward normal is (1.75, -1) / length.
    length = math.hypot(1.75, 1.0)
    return np.maximum(y - 0.8, (1.75 * np.abs(x) - (y + 0.95)) / length)


# Distance to the outline at unit radius, negative inside.
DISTANCES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "circle": _circle,
    "cross": _cross,
    "diamond": _diamond,
    "ring": _ring,
    "square": _square,
    "triangle": _triangle,
}


def render_scenes(scenes: Sequence[Scene], image_size: int) -> np.ndarray:
    """Draws the scenes: uint8 [N, image_size, image_size, 3]."""
    canvas = _backgrounds(scenes, image_size)
    rows = [row for row, scene in enumerate(scenes) for _ in scene.objects]
    objects = [item for scene in scenes for item in scene.objects]
    window = _window(image_size)
    top, left, cover = _coverage(objects, image_size, window)
    steps = np.arange(window)
    place = (
        np.asarray(rows)[:, None, None],
        top[:, None, None] + steps[None, :, None],
        left[:, None, None] + steps[None, None, :],
    )
    rgb = np.array([item.rgb for item in objects], dtype=np.float32).reshape(-1, 1, 1, 3)
    # Windows of one picture may overlap, so objects are laid down one after the other.
    order = np.concatenate([np.arange(len(scene.objects)) for scene in scenes]) if scenes else np.zeros(0)
    for layer in range(3):
        chosen = order == layer
        where = tuple(axis[chosen] for axis in place)
        alpha = cover[chosen][..., None]
        canvas[where] += alpha * (rgb[chosen] - canvas[where])
    return np.rint(np.clip(canvas, 0, 255)).astype(np.uint8)


def object_masks(scene: Scene, image_size: int) -> np.ndarray:
    """Which pixels belong to each object (at least half covered): bool [objects, image_size, image_size]."""
    _, _, cover = _coverage(scene.objects, image_size, image_size)
    return cover >= 0.5


def shape_coverage(shape: str, x: float, y: float, radius: float, image_size: int) -> np.ndarray:
    """How much of each pixel a shape covers, 0 to 1: float32 [image_size, image_size]."""
    item = SceneObject("red", shape, "small", x, y, radius, (0.0, 0.0, 0.0))
    return _coverage([item], image_size, image_size)[2][0]


def _window(image_size: int) -> int:
    """Side of a square of pixels that holds any object with its soft edge."""
    return min(image_size, math.ceil(2 * RADII["large"][1] * image_size) + 3)


def _coverage(
    objects: Sequence[SceneObject], image_size: int, window: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each object's window (top, left) and the covered part of its pixels, float32 [objects, window, window]."""
    x, y, radius = np.array([(item.x, item.y, item.radius) for item in objects], dtype=np.float32).reshape(-1, 3).T
    top, left = (
        np.clip(np.rint(center * image_size - window / 2), 0, image_size - window).astype(np.int64) for center in (y, x)
    )
    steps = np.arange(window, dtype=np.float32) + 0.5
    across = ((left[:, None] + steps) / image_size - x[:, None]) / radius[:, None]
    down = ((top[:, None] + steps) / image_size - y[:, None]) / radius[:, None]
    cover = np.empty((len(objects), window, window), dtype=np.float32)
    shapes = np.array([item.shape for item in objects])
    for shape, distance in DISTANCES.items():
        chosen = np.flatnonzero(shapes == shape)
        if len(chosen):
            pixels = distance(across[chosen][:, None, :], down[chosen][:, :, None])
            cover[chosen] = np.clip(0.5 - pixels * (radius[chosen] * image_size)[:, None, None], 0, 1)
    return top, left, cover


def _backgrounds(scenes: Sequence[Scene], image_size: int) -> np.ndarray:
    """Greyish backgrounds, dark to light: a tint, a gradient, soft stripes, fine grain. float32 [N, S, S, 3]."""
    draws = np.array([scene.background for scene in scenes], dtype=np.float32).reshape(-1, 12)
    base = (50 + 165 * draws[:, 0])[:, None] + 24 * (draws[:, 1:4] - 0.5)
    axis = (np.arange(image_size, dtype=np.float32) + 0.5) / image_size - 0.5
    angle = 2 * np.pi * draws[:, 4]
    slope = 40 * draws[:, 5]
    stripes = np.where(draws[:, 6] < 0.5, 0, 14 * draws[:, 7])
    turns = 2 * np.pi * (1 + 4 * draws[:, 8])
    phase = 2 * np.pi * draws[:, 9]
    along = np.cos(angle)[:, None, None] * axis + np.sin(angle)[:, None, None] * axis[:, None]
    level = slope[:, None, None] * along
    level += stripes[:, None, None] * np.sin(turns[:, None, None] * along + phase[:, None, None])
    shift = (draws[:, 10:12] * _NOISE_SIDE).astype(np.int64)
    steps = np.arange(image_size)
    level += _noise()[
        (shift[:, 0, None, None] + steps[:, None]) % _NOISE_SIDE, (shift[:, 1, None, None] + steps) % _NOISE_SIDE
    ]
    return level[..., None] + base[:, None, None, :]


@functools.cache
def _noise() -> np.ndarray:
    noise = np.random.Generator(np.random.Philox(key=0)).normal(0, 3.5, (_NOISE_SIDE, _NOISE_SIDE)).astype(np.float32)
    noise.flags.writeable = False
    return noise
