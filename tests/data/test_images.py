"""Every kind of picture comes out right, every damaged one is named, and pixels equal the stock processor's."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from mmattn.data.images import PixelTransform, RandomView, open_image
from mmattn.errors import DataError, UsageError

RED, WHITE = (255, 0, 0), (255, 255, 255)


def _photo(height=37, width=53, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


def _bytes(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "WEBP"])
def test_ordinary_files(tmp_path, kind):
    pixels = _photo()
    path = tmp_path / f"a.{kind.lower()}"
    Image.fromarray(pixels).save(path, kind, **({"lossless": True} if kind == "WEBP" else {}))
    for source in (path, str(path), path.read_bytes(), Image.open(path), pixels):
        image = open_image(source)
        assert image.mode == "RGB"
        assert np.array_equal(np.asarray(image), pixels)


def test_transparency_is_pasted_on_white():
    half = Image.new("RGBA", (4, 3), (255, 0, 0, 128))
    half.putpixel((0, 0), (0, 0, 0, 0))
    half.putpixel((1, 0), (255, 0, 0, 255))
    image = open_image(_bytes(half))
    assert image.getpixel((0, 0)) == WHITE
    assert image.getpixel((1, 0)) == RED
    assert image.getpixel((2, 2)) == (255, 127, 127)
    grey = open_image(_bytes(Image.new("LA", (2, 2), (0, 0))))
    assert grey.getpixel((0, 0)) == WHITE


def test_palettes_with_and_without_transparency():
    pixels = np.zeros((5, 7, 3), dtype=np.uint8)
    pixels[:, 3:] = RED
    palette = Image.fromarray(pixels).quantize(4)
    assert palette.mode == "P"
    assert np.array_equal(np.asarray(open_image(_bytes(palette))), pixels)
    index = palette.getpixel((0, 0))
    image = open_image(_bytes(palette, transparency=index))
    assert image.getpixel((0, 0)) == WHITE
    assert image.getpixel((6, 4)) == RED


def test_a_colour_that_stands_for_transparent():
    image = open_image(_bytes(Image.new("RGB", (3, 3), RED), transparency=RED))
    assert image.getpixel((1, 1)) == WHITE


def test_cmyk():
    image = open_image(_bytes(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=95))
    assert image.mode == "RGB"
    assert np.abs(np.asarray(image).astype(int) - RED).max() <= 3


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_and_not_clipped(kind):
    ramp = np.linspace(0, 65535, 48).astype(np.uint16).reshape(4, 12)
    image = open_image(_bytes(Image.fromarray(ramp), kind))
    assert np.array_equal(np.asarray(image)[..., 0], np.rint(ramp / 257).astype(np.uint8))


def test_deep_colour_and_float_and_bits():
    rows = b"".join(b"\0" + struct.pack(">6H", 65535, 32768, 0, 256, 65535, 0) for _ in range(2))
    header = struct.pack(">2I5B", 2, 2, 16, 2, 0, 0, 0)
    deep = b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(rows)) + _chunk(b"IEND", b"")
    assert open_image(deep).getpixel((0, 0)) == (255, 128, 0)
    ramp = np.array([[0.0, 0.5, 1.0]], dtype=np.float32)
    assert np.asarray(open_image(_bytes(Image.fromarray(ramp), "TIFF")))[0, :, 0].tolist() == [0, 128, 255]
    assert open_image(_bytes(Image.new("1", (3, 3), 1))).getpixel((0, 0)) == WHITE


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@pytest.mark.parametrize(("orientation", "corner"), [(1, (0, 0)), (3, (6, 4)), (6, (4, 0)), (8, (0, 6)), (2, (6, 0))])
def test_exif_rotation_is_applied(orientation, corner):
    picture = Image.new("RGB", (7, 5), "white")
    picture.putpixel((0, 0), RED)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = open_image(_bytes(picture, exif=exif))
    assert image.size == ((5, 7) if orientation in (6, 8) else (7, 5))
    assert image.getpixel(corner) == RED


def test_grey_and_array_inputs():
    grey = np.arange(12, dtype=np.uint8).reshape(3, 4)
    assert np.array_equal(np.asarray(open_image(grey))[..., 2], grey)
    with pytest.raises(DataError, match=r"array: an array of float64 \[3, 4\] is no picture: give uint8"):
        open_image(grey.astype(float))
    with pytest.raises(DataError, match="image: a picture of 0 x 5 pixels shows nothing"):
        open_image(Image.new("RGB", (0, 5)))
    with pytest.raises(DataError, match=r"\[3, 4, 2\] is no picture"):
        open_image(np.zeros((3, 4, 2), dtype=np.uint8))


def test_missing_damaged_and_foreign_files_are_named(tmp_path):
    good = _bytes(Image.fromarray(_photo()), "JPEG")
    files = {
        "text.png": b"this is not a picture",
        "empty.png": b"",
        "cut.jpg": good[: len(good) // 2],
        "cut.png": _bytes(Image.fromarray(_photo()))[:900],
        "page.png": b"<html><body>404</body></html>",
        "program.jpg": _bytes(Image.fromarray(_photo()), "EPS"),
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError, match=name) as caught:
            open_image(tmp_path / name)
        assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match=r"text\.png: not a picture, or of a kind that Pillow cannot read"):
        open_image(tmp_path / "text.png")
    with pytest.raises(DataError, match=r"cut\.jpg: damaged picture \(image file is truncated"):
        open_image(tmp_path / "cut.jpg")
    with pytest.raises(DataError, match=r"picture 3: damaged picture \(image file is truncated"):
        open_image(Image.open(tmp_path / "cut.jpg"), name="picture 3")
    with pytest.raises(DataError, match=r"program\.jpg: EPS, which another program would draw: save it as PNG"):
        open_image(tmp_path / "program.jpg")
    with pytest.raises(DataError, match=r"gone\.png: no such file"):
        open_image(tmp_path / "gone.png")
    with pytest.raises(DataError, match=f"{tmp_path.name}: is a folder; give a picture file"):
        open_image(tmp_path)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("side", [12_000, 60_000])
def test_a_decompression_bomb_is_refused_before_it_is_decoded(side):
    header = struct.pack(">2I5B", side, side, 8, 2, 0, 0, 0)
    bomb = (
        b"\x89PNG\r\n\x1a\n"
        + _chunk(b"IHDR", header)
        + _chunk(b"IDAT", zlib.compress(b"\0" * 999))
        + _chunk(b"IEND", b"")
    )
    with pytest.raises(DataError, match=r"bomb\.png: picture too large .*: at most 89478485 pixels are read"):
        open_image(bomb, name="bomb.png")
    with pytest.raises(DataError, match=r"too large \(53 x 37\): at most 1000 pixels"):
        open_image(_bytes(Image.fromarray(_photo())), max_pixels=1000)


@pytest.mark.parametrize("size", [32, 37, 96])
def test_pixels_equal_the_stock_processor(size):
    images = [
        Image.fromarray(_photo(37, 53, 1)),
        Image.fromarray(_photo(size, size, 2)),
        Image.fromarray(_photo(131, 17, 3)),
    ]
    processor = BlipImageProcessorPil(size={"height": size, "width": size})
    expected = processor(images, return_tensors="pt")["pixel_values"]
    assert torch.equal(PixelTransform(size)(images), expected)
    assert torch.equal(PixelTransform.from_processor(processor)([np.asarray(image) for image in images]), expected)


def test_transform_follows_the_processors_mean_std_and_filter():
    processor = BlipImageProcessorPil(
        size={"height": 24, "width": 24}, image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 0.6, 0.7], resample=2
    )
    images = [_photo(41, 43)]
    assert torch.equal(
        PixelTransform.from_processor(processor)(images),
        processor([Image.fromarray(images[0])], return_tensors="pt")["pixel_values"],
    )
    with pytest.raises(UsageError, match="must resize to a square"):
        PixelTransform.from_processor(BlipImageProcessorPil(size={"height": 24, "width": 25}))
    with pytest.raises(UsageError, match="needs a positive size"):
        PixelTransform(0)


def test_views_are_crops_of_the_wanted_area():
    pixels = _photo(64, 48)
    view = RandomView(min_area=0.5, flip=True)
    areas = [view(pixels, np.random.default_rng(seed)).size / pixels.size for seed in range(100)]
    assert 0.47 < min(areas) < 0.6
    assert max(areas) > 0.9
    assert np.array_equal(view(pixels, np.random.default_rng(3)), view(pixels, np.random.default_rng(3)))
    assert np.array_equal(RandomView()(pixels, np.random.default_rng(0)), pixels)
    mirrored = [RandomView(flip=True)(pixels, np.random.default_rng(seed)) for seed in range(20)]
    assert {np.array_equal(one, pixels[:, ::-1]) for one in mirrored} == {True, False}
    with pytest.raises(UsageError, match="min_area must lie between 0 and 1, not 0"):
        RandomView(min_area=0)
