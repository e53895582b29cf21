"""Several pictures with their captions as one."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from mmattn.errors import UsageError
from mmattn.maps.draw import wrap_text

_MARGIN = 8
_FONT_SIZE = 13
_LINE_HEIGHT = _FONT_SIZE + 3
_LEAST_SIDE = 128  # pixels of a cell, so that small pictures and their captions can be made out


def picture_grid(
    images: Sequence[Image.Image],
    labels: Sequence[str] | None = None,
    *,
    columns: int | None = None,
    scale: int | None = None,
) -> Image.Image:
    """Pictures in rows, each with its caption below it.

    Args:
        images: of any sizes; a cell has room for the largest.
        labels: captions, one a picture; wrapped to the picture's width. None: none.
        columns: pictures in a row; None: about as many as there are rows.
        scale: whole factor by which pictures are enlarged, pixel by pixel; None: as much as makes the largest about 128
            pixels, 1 for larger ones.

    Returns:
        An RGB picture on white.

    Raises:
        UsageError: no pictures, another number of labels, or columns or scale below 1.
    """
    if not images:
        raise UsageError("picture_grid: no pictures were given")
    texts = [""] * len(images) if labels is None else list(labels)
    if len(texts) != len(images):
        raise UsageError(f"picture_grid: {len(texts)} labels for {len(images)} pictures: give one for each")
    width, height = (max(image.size[axis] for image in images) for axis in (0, 1))
    columns = math.ceil(math.sqrt(len(images))) if columns is None else columns
    scale = max(1, round(_LEAST_SIDE / max(width, height))) if scale is None else scale
    if columns < 1 or scale < 1:
        raise UsageError(f"picture_grid: columns is {columns} and scale {scale}: both must be 1 or more")
    width, height = width * scale, height * scale
    font = ImageFont.load_default(_FONT_SIZE)
    captions = [wrap_text(text, font, width) for text in texts]
    rows = [range(start, min(start + columns, len(images))) for start in range(0, len(images), columns)]
    heights = [height + _LINE_HEIGHT * max(len(captions[number]) for number in row) + _MARGIN for row in rows]
    columns = min(columns, len(images))
    canvas = Image.new("RGB", (columns * (width + _MARGIN) + _MARGIN, sum(heights) + _MARGIN), "white")
    pen = ImageDraw.Draw(canvas)
    top = _MARGIN
    for row, row_height in zip(rows, heights, strict=True):
        for place, number in enumerate(row):
            left = _MARGIN + place * (width + _MARGIN)
            canvas.paste(_enlarged(images[number], scale), (left, top))
            for line, text in enumerate(captions[number]):
                pen.text((left, top + height + 2 + line * _LINE_HEIGHT), text, fill="black", font=font)
        top += row_height
    return canvas


def _enlarged(image: Image.Image, scale: int) -> Image.Image:
    size = (image.width * scale, image.height * scale)
    return image.convert("RGB").resize(size, Image.Resampling.NEAREST)
