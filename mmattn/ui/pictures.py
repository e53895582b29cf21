"""Pictures that visitors give: checked before they are decoded."""

from __future__ import annotations

from pathlib import Path

import gradio as gr
from PIL import Image, UnidentifiedImageError

from mmattn.data.images import open_image
from mmattn.errors import DataError, UsageError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "AVIF")
"""The others of Pillow's readers are not let near a stranger's file."""

_ENDINGS = [".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".avif"]


def picture_input() -> gr.File:
    """A field to drop a picture on. Unlike `gr.Image` it hands the file over as it came, so that `open_upload` can say
    what is wrong with it before anything is decoded."""
    return gr.File(label="Drop a picture", file_types=_ENDINGS, height=140, elem_classes=["given"])


def open_upload(file: str | None) -> Image.Image:
    """The picture, upright and in RGB.

    Raises:
        UsageError: there is none.
        DataError: no picture of these `FORMATS`, a damaged one or one with too many pixels.
    """
    if file is None:
        raise UsageError("no picture yet: drop one on the field, or click on it to choose one")
    name = Path(file).name[-80:]
    try:
        Image.open(file, formats=FORMATS).close()
    except UnidentifiedImageError as error:
        raise DataError(f"{name}: not a picture; give one of {', '.join(FORMATS)}") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        pass  # open_image says what it is
    return open_image(file, name=name)
