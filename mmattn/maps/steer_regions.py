"""Regions of a picture, at the resolution of any layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from mmattn.errors import UsageError

_SIDES = "(left, top, right, bottom) in fractions of the picture, from 0 to 1"


@dataclass(frozen=True, eq=False)
class Region:
    """Where in the picture a phrase may be looked for.

    Attributes:
        phrase: words of the prompt.
        box: left, top, right and bottom in fractions of the picture's sides; None for a mask.
        mask: float `[1, 1, height, width]` of 0 and 1, of any size, stretched over the picture; None for a box.
    """

    phrase: str
    box: tuple[float, float, float, float] | None = None
    mask: Tensor | None = None

    @property
    def is_everything(self) -> bool:
        """Whether it covers the whole picture, and so says nothing."""
        return self.box == (0.0, 0.0, 1.0, 1.0) if self.mask is None else bool((self.mask == 1).all())

    def coverage(self, height: int, width: int) -> Tensor:
        """The share of each cell that lies in the region, float64 `[height, width]`."""
        if self.mask is not None:
            return _area_mean(self.mask, height, width)
        assert self.box is not None
        left, top, right, bottom = self.box
        return torch.outer(_overlap(top, bottom, height), _overlap(left, right, width))


def _overlap(start: float, end: float, count: int) -> Tensor:
    """The share of each of `count` equal cells of 0 to 1 that lies between two places, float64 `[count]`."""
    edges = torch.arange(count + 1, dtype=torch.float64) / count
    inside = edges.clamp(start, end)
    return ((inside[1:] - inside[:-1]) * count).clamp(0, 1)


def _area_mean(mask: Tensor, height: int, width: int) -> Tensor:
    """Mean of a mask over each cell of a grid of any size, exact also where cells cut through pixels."""
    for axis, count in ((2, height), (3, width)):
        size = mask.shape[axis]
        # Means over cells that are whole fractions of pixels: by way of a common multiple, one axis at a time.
        sums = F.pad(mask.double().cumsum(axis).movedim(axis, -1), (1, 0))
        places = torch.arange(count + 1, dtype=torch.float64) * size / count
        lower = places.floor().long().clamp(max=size - 1)
        rest = places - lower
        at = sums[..., lower] + rest * (sums[..., lower + 1] - sums[..., lower])
        mask = ((at[..., 1:] - at[..., :-1]) * count / size).movedim(-1, axis)
    return mask[0, 0].clamp(0, 1)


def read_regions(regions: Any) -> list[Region]:
    """The regions as the caller of `steer_attention` gave them.

    Raises:
        UsageError: no mapping, or a region that is empty, outside the picture, or neither a box nor a mask.
    """
    if not isinstance(regions, Mapping):
        raise UsageError(
            f"steer_attention: regions is a {type(regions).__name__}; give phrases with boxes or masks: "
            '{"a red circle": (0, 0, 0.5, 1)}'
        )
    return [_read_region(phrase, given) for phrase, given in regions.items()]


def _read_region(phrase: Any, given: Any) -> Region:
    if not isinstance(phrase, str) or not phrase.strip():
        raise UsageError(f"steer_attention: regions has {phrase!r} for a phrase; give words of the prompt")
    what = f"steer_attention: the region of {phrase!r}"
    is_box = isinstance(given, Sequence) and len(given) == 4 and all(isinstance(side, int | float) for side in given)
    if is_box:
        return Region(phrase, box=_read_box(what, given))
    return Region(phrase, mask=_read_mask(what, given))


def _read_box(what: str, given: Sequence[float]) -> tuple[float, float, float, float]:
    left, top, right, bottom = (float(side) for side in given)
    if not all(0.0 <= side <= 1.0 for side in (left, top, right, bottom)):
        raise UsageError(f"{what}, {tuple(given)}, reaches outside the picture; a box is {_SIDES}")
    if left >= right or top >= bottom:
        raise UsageError(f"{what}, {tuple(given)}, is empty; a box is {_SIDES}")
    return left, top, right, bottom


def _read_mask(what: str, given: Any) -> Tensor:
    if isinstance(given, Image.Image):
        given = np.asarray(given.convert("L")) >= 128
    if isinstance(given, np.ndarray):
        given = torch.from_numpy(np.ascontiguousarray(given))
    if not isinstance(given, Tensor) or given.dim() != 2:
        kind = f"{type(given).__name__} {list(given.shape)}" if isinstance(given, Tensor) else repr(given)
        raise UsageError(
            f"{what} is {kind[:60]}; give a box {_SIDES}, or a picture or array [height, width] of 0 and 1"
        )
    if not bool(((given == 0) | (given == 1)).all()):
        raise UsageError(f"{what} has other values than 0 and 1; give a mask such as picture > 127")
    if not bool(given.any()):
        raise UsageError(f"{what} is empty: its mask is 0 everywhere")
    return given.detach().to("cpu", torch.float32)[None, None]
