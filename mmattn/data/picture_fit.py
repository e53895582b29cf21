"""Pictures of any size to the size that a diffusion model trains on: covered, cropped, perhaps mirrored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmattn.errors import ConfigError, DataError, UsageError

CROPS = ("center", "random")
MAX_ENLARGEMENT = 2.0  # beyond it a model learns the blur of the filter instead of the picture


@dataclass
class PictureConfig:
    """How pictures become training examples of a diffusion model.

    Args:
        resolution: Side of the training pictures in pixels; with `buckets` their area is at most its square.
        buckets: Keep the pictures' shapes about: each goes into the aspect bucket that is nearest to its own.
        step: buckets: sides are multiples of so many pixels, which is a multiple of 8 for Stable Diffusion.
        max_aspect: buckets: the longest side over the shortest, at most. Longer pictures are cropped.
        crop: Which part is kept of what the target shape cannot hold: "center" or "random".
        flip: Mirror half of the pictures. Not where captions say left or right, or pictures show text.
        min_side: Pictures with a shorter side than this, in pixels, are unusable. None: those are that would have to be
            enlarged more than twofold.
    """

    resolution: int = 512
    buckets: bool = False
    step: int = 64
    max_aspect: float = 2.0
    crop: str = "center"
    flip: bool = False
    min_side: int | None = None

    def __post_init__(self) -> None:
        for key in ("resolution", "step"):
            if getattr(self, key) < 1:
                raise ConfigError(f"pictures.{key} must be 1 or more, not {getattr(self, key)}")
        if self.crop not in CROPS:
            raise ConfigError(f"pictures.crop must be one of {', '.join(CROPS)}, not {self.crop!r}")
        if not self.max_aspect >= 1:
            raise ConfigError(f"pictures.max_aspect must be 1 or more, not {self.max_aspect}")
        if self.buckets and self.resolution % self.step:
            raise ConfigError(
                f"pictures.resolution {self.resolution} must be a multiple of pictures.step {self.step} with buckets"
            )
        if self.min_side is not None and self.min_side < 1:
            raise ConfigError(f"pictures.min_side must be 1 or more, or null, not {self.min_side}")


@dataclass(frozen=True, eq=False)
class FittedPicture:
    """A picture at its training size, and where it comes from (what SDXL is told, arXiv 2307.01952 section 2.2).

    Attributes:
        pixels: uint8 [H, W, 3].
        original: Height and width before.
        crop: Top and left of the crop, in pixels of the resized (and mirrored) picture.
    """

    pixels: np.ndarray
    original: tuple[int, int]
    crop: tuple[int, int]

    def time_ids(self) -> tuple[int, ...]:
        """Original height and width, top and left of the crop, target height and width: SDXL's six numbers."""
        return (*self.original, *self.crop, *self.pixels.shape[:2])


def fit_picture(
    image: np.ndarray, size: tuple[int, int], *, place: tuple[float, float] = (0.5, 0.5), mirrored: bool = False
) -> FittedPicture:
    """Mirror, resize (Lanczos, shape kept) until the target is covered, and crop.

    Args:
        image: uint8 [h, w, 3].
        size: Height and width of the target.
        place: Where the crop lies between top and bottom, left and right, each in [0, 1].
        mirrored: Swap left and right.
    """
    original = (image.shape[0], image.shape[1])
    if mirrored:
        image = image[:, ::-1]
    scale = max(target / side for target, side in zip(size, original, strict=True))
    height, width = (max(target, round(side * scale)) for target, side in zip(size, original, strict=True))
    if (height, width) != original:
        picture = Image.fromarray(np.ascontiguousarray(image))
        image = np.asarray(picture.resize((width, height), Image.Resampling.LANCZOS))
    top, left = (
        int(share * (side - target + 1)) for share, side, target in zip(place, (height, width), size, strict=True)
    )
    return FittedPicture(image[top : top + size[0], left : left + size[1]], original, (top, left))


def require_large_enough(name: str, original: tuple[int, int], size: tuple[int, int], config: PictureConfig) -> None:
    """Raises `DataError` for a picture too small for the target `size`; both are (height, width)."""
    height, width = original
    what = f"{name}: picture too small ({width} x {height} pixels)"
    if config.min_side is not None:
        if min(original) < config.min_side:
            raise DataError(
                f"{what}: its shorter side is below pictures.min_side {config.min_side}; leave it out, or lower that"
            )
        return
    scale = max(target / side for target, side in zip(size, original, strict=True))
    if scale > MAX_ENLARGEMENT:
        raise DataError(
            f"{what}: it would have to be enlarged {scale:.1f} times to {size[1]} x {size[0]}, and "
            f"{MAX_ENLARGEMENT:g} times is the most; leave it out, lower pictures.resolution, or set pictures.min_side"
        )


def signed_pixels(pictures: Sequence[np.ndarray]) -> Tensor:
    """uint8 [H, W, 3] pictures of one size to float32 [B, 3, H, W] in [-1, 1]."""
    if len({picture.shape for picture in pictures}) > 1:
        shapes = ", ".join(sorted({f"{picture.shape[1]} x {picture.shape[0]}" for picture in pictures}))
        raise UsageError(f"pictures of several sizes cannot share a batch: {shapes}")
    pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
    return pixels.to(torch.float32, memory_format=torch.contiguous_format).div_(127.5).sub_(1)
