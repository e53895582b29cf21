"""Picture files to RGB pixels, and pixels to what a network takes.

Every way in which a picture may be unusable ends in one `DataError` that names it, so that readers can count and
skip. Nothing is decoded before its size is known.
"""

from __future__ import annotations

import contextlib
import io
import math
import struct
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from mmattn.errors import DataError, UsageError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
MAX_PIXELS = 89_478_485  # Pillow's own warning line: a quarter of a gigabyte as RGB

# Pillow would start Ghostscript on what somebody else has written, or ask Windows.
_DRAWN_BY_OTHERS = ("EPS", "WMF")
_DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, struct.error, zlib.error)


def open_image(
    source: str | Path | bytes | Image.Image | np.ndarray, *, name: str | None = None, max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """Opens a picture upright and in RGB: transparency on white, 16 bits scaled to 8, EXIF rotation applied.

    Args:
        source: A file, a file's bytes, a Pillow picture, or a uint8 array [H, W], [H, W, 3] or [H, W, 4].
        name: What to call it in an error; a file's path by default.
        max_pixels: Larger pictures are refused before they are decoded.

    Raises:
        DataError: it is missing, a folder, no picture, damaged or too large.
    """
    if isinstance(source, Image.Image):
        try:
            source.load()  # Pillow has read no more than the head of a file until then
        except _DECODE_ERRORS as error:
            raise _damaged(name or "image", error) from error
        return _to_rgb(source, name or "image")
    if isinstance(source, np.ndarray):
        return _to_rgb(_from_array(source, name or "array"), name or "array")
    label = name or (f"{len(source)} bytes" if isinstance(source, bytes) else str(source))
    stream = io.BytesIO(source) if isinstance(source, bytes) else Path(source)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(stream) as image:
                if image.format in _DRAWN_BY_OTHERS:
                    raise DataError(f"{label}: {image.format}, which another program would draw: save it as PNG")
                if image.width * image.height > max_pixels:
                    raise DataError(_too_large(label, f"{image.width} x {image.height}", max_pixels))
                image.load()
                return _to_rgb(image, label)
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"{label}: no such file") from error
    except IsADirectoryError as error:
        raise DataError(f"{label}: is a folder; give a picture file") from error
    except Image.DecompressionBombError as error:
        raise DataError(_too_large(label, "decompression bomb", max_pixels)) from error
    except UnidentifiedImageError as error:
        raise DataError(f"{label}: not a picture, or of a kind that Pillow cannot read") from error
    except _DECODE_ERRORS as error:
        raise _damaged(label, error) from error


def _damaged(label: str, error: Exception) -> DataError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return DataError(f"{label}: damaged picture ({reason})")


def _too_large(label: str, size: str, max_pixels: int) -> str:
    return f"{label}: picture too large ({size}): at most {max_pixels} pixels are read"


def _from_array(array: np.ndarray, label: str) -> Image.Image:
    is_picture = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))
    if array.dtype != np.uint8 or not is_picture or not array.size:
        raise DataError(
            f"{label}: an array of {array.dtype} {list(array.shape)} is no picture: "
            "give uint8 [H, W], [H, W, 3] or [H, W, 4]"
        )
    return Image.fromarray(np.ascontiguousarray(array))


def _to_rgb(image: Image.Image, label: str) -> Image.Image:
    if 0 in image.size:
        raise DataError(f"{label}: a picture of {image.width} x {image.height} pixels shows nothing")
    with contextlib.suppress(*_DECODE_ERRORS):  # a damaged EXIF block says nothing about the pixels
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        image = _deep_to_grey(image, label)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("LA").convert("RGBA") if image.mode == "La" else image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _deep_to_grey(image: Image.Image, label: str) -> Image.Image:
    """16-bit, 32-bit and float grey to 8 bits. Pillow's own `convert` would clip at 255."""
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise DataError(f"{label}: damaged picture (pixels that are not finite)")
    highest = values.max(initial=0)
    if image.mode == "F":
        full = 1.0 if highest <= 1 else 255.0 if highest <= 255 else highest
    else:
        full = 65535.0 if highest <= 65535 else 2.0**31 - 1
    return Image.fromarray(np.rint(np.clip(values / full, 0, 1) * 255).astype(np.uint8))


class PixelTransform:
    """RGB pictures of any sizes to a float32 batch: squeezed to a square (bicubic), scaled to 0..1, normalised.

    Gives bit for bit what `BlipImageProcessorPil` gives for the same size, mean and std.

    Args:
        size: Side in pixels.
        mean: By channel, on the scale 0..1.
        std: By channel, on the scale 0..1.
        resample: Pillow's number of the resampling filter.
    """

    def __init__(
        self,
        size: int,
        mean: Sequence[float] = CLIP_MEAN,
        std: Sequence[float] = CLIP_STD,
        resample: int = Image.Resampling.BICUBIC,
    ) -> None:
        if size < 1 or len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise UsageError(f"PixelTransform needs a positive size and std and 3 means, not {size}, {mean}, {std}")
        self.size, self.mean, self.std = size, tuple(mean), tuple(std)
        self.resample = Image.Resampling(resample)
        # A pixel takes 256 values, so the processor's float64 and float32 steps are done once, on a table.
        levels = (np.arange(256, dtype=np.float64) * (1 / 255)).astype(np.float32)[:, None]
        self._table = (levels - np.array(mean, dtype=np.float32)) / np.array(std, dtype=np.float32)

    @classmethod
    def from_processor(cls, processor: Any) -> PixelTransform:
        """The transform that a transformers image processor describes.

        Raises:
            UsageError: the processor does something else than resize to a square, rescale and normalise.
        """
        size = dict(processor.size)
        steps = (processor.do_resize, processor.do_rescale, processor.do_normalize)
        if not all(steps) or size.get("height") != size.get("width") or not size.get("height"):
            raise UsageError(f"the image processor must resize to a square, rescale and normalise; it has size {size}")
        if getattr(processor, "do_center_crop", None) or not math.isclose(processor.rescale_factor, 1 / 255):
            raise UsageError("image processors that crop, or rescale by another factor than 1/255, are not supported")
        return cls(size["height"], processor.image_mean, processor.image_std, int(processor.resample))

    def __call__(self, images: Sequence[np.ndarray | Image.Image]) -> torch.Tensor:
        """Pictures (uint8 [H, W, 3] or RGB Pillow pictures) to float32 [B, 3, size, size]."""
        pixels = np.stack([self._resized(image) for image in images])
        batch = np.empty((len(pixels), 3, self.size, self.size), dtype=np.float32)
        for channel in range(3):
            np.take(self._table[:, channel], pixels[..., channel], out=batch[:, channel])
        return torch.from_numpy(batch)

    def fitted(self, image: Image.Image) -> Image.Image:
        """An RGB picture squeezed to the square: all of it that a network sees. Fitted again it stays as it is."""
        return image if image.size == (self.size, self.size) else image.resize((self.size, self.size), self.resample)

    def _resized(self, image: np.ndarray | Image.Image) -> np.ndarray:
        if isinstance(image, np.ndarray):
            if image.shape == (self.size, self.size, 3):
                return image
            image = Image.fromarray(image)
        return np.asarray(self.fitted(image))


@dataclass(frozen=True)
class RandomView:
    """Another view of a training picture: a random crop, perhaps mirrored. Not for captions that say left or right.

    Args:
        min_area: The crop keeps at least this part of the picture.
        flip: Mirror half of the pictures.
    """

    min_area: float = 1.0
    flip: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.min_area <= 1:
            raise UsageError(f"min_area must lie between 0 and 1, not {self.min_area}")

    def __call__(self, image: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """uint8 [H, W, 3] to uint8 [h, w, 3]; draws only from `generator`."""
        area, down, across, mirror = generator.random(4)
        side = math.sqrt(self.min_area + (1 - self.min_area) * area)
        height, width = (max(1, round(length * side)) for length in image.shape[:2])
        top, left = int(down * (image.shape[0] - height + 1)), int(across * (image.shape[1] - width + 1))
        view = image[top : top + height, left : left + width]
        if self.flip and mirror < 0.5:
            view = view[:, ::-1]
        return np.ascontiguousarray(view)
