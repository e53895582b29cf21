"""Files that strangers send."""

from __future__ import annotations

import pytest
from PIL import Image

from mmattn.errors import DataError, UsageError

pytest.importorskip("gradio")
given = pytest.importorskip("mmattn.ui.pictures")


def test_a_picture_is_upright_and_rgb(tmp_path):
    image = Image.new("RGB", (31, 17), "red")
    image.paste("blue", (0, 0, 31, 5))
    exif = image.getexif()
    exif[274] = 6  # a camera held on its side
    image.save(tmp_path / "a.jpg", exif=exif, quality=95)
    opened = given.open_upload(str(tmp_path / "a.jpg"))
    assert (opened.size, opened.mode) == ((17, 31), "RGB")
    red, _, blue = opened.getpixel((15, 15))
    assert blue > 200 > red


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_the_kinds_that_browsers_show(kind, tmp_path):
    Image.new("RGB", (13, 11), "white").save(tmp_path / "a", format=kind)
    assert given.open_upload(str(tmp_path / "a")).size == (13, 11)


def test_what_is_refused(tmp_path):
    with pytest.raises(UsageError, match="no picture yet"):
        given.open_upload(None)
    Image.new("RGB", (13, 11)).save(tmp_path / "a.png", format="TIFF")
    with pytest.raises(DataError, match=r"^a.png: not a picture; give one of PNG, JPEG, WEBP"):
        given.open_upload(str(tmp_path / "a.png"))
    with pytest.raises(DataError, match="no such file"):
        given.open_upload(str(tmp_path / "gone.png"))
