"""Heat maps over pictures."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# Twenty even steps of matplotlib's perceptually uniform "viridis" (public domain, CC0).
_VIRIDIS = (
    "440154 481567 482677 453781 404788 39568c 33638d 2d708e 287d8e 238a8d "
    "1f968b 20a387 29af7f 3cbb75 55c667 73d055 95d840 b8de29 dce319 fde725"
)
_SIDES = (320, 640)  # least and greatest length of the longer side of a picture as drawn
MARGIN = 12
_BAR_WIDTH = 160
FONT_SIZE = 16
_GRID_SIDE = 192  # longer side of a tile
_GRID_COLUMNS = 5


def viridis(values: np.ndarray) -> np.ndarray:
    """Numbers from 0 to 1 to colours, uint8 `[..., 3]`; equal steps look equally large."""
    table = np.array([[int(entry[i : i + 2], 16) for i in (0, 2, 4)] for entry in _VIRIDIS.split()], dtype=np.float64)
    places = np.clip(values, 0.0, 1.0) * (len(table) - 1)
    channels = [np.interp(places, np.arange(len(table)), table[:, channel]) for channel in range(3)]
    return np.rint(np.stack(channels, axis=-1)).astype(np.uint8)


@dataclass(frozen=True, eq=False)
class Heatmap:
    """How much attention each part of a picture got.

    Attributes:
        values: weights `[rows, columns]` of the picture's grid.
        image: the picture.
        word: what was looked for.
        sentence: the text that it belongs to.
    """

    values: np.ndarray
    image: Image.Image
    word: str
    sentence: str

    def peak(self) -> tuple[float, float]:
        """Place of the most attended cell's middle: (x, y) in the picture's own pixels, from its top left corner."""
        row, column = np.unravel_index(int(self.values.argmax()), self.values.shape)
        rows, columns = self.values.shape
        return (float(column) + 0.5) * self.image.width / columns, (float(row) + 0.5) * self.image.height / rows

    def draw(self, *, beside: bool = True) -> Image.Image:
        """The picture, and beside it the picture under the map's colours; with word, sentence and legend; RGB.

        Args:
            beside: False: the second one alone, where the picture itself is shown already.
        """
        longer = max(self.image.size)
        scale = min(max(longer, _SIDES[0]), _SIDES[1]) / longer
        size = (max(1, round(self.image.width * scale)), max(1, round(self.image.height * scale)))
        overlay = _overlay(self.image, self.values, size)
        self._mark_peak(overlay, scale)
        title, subtitle = load_font(FONT_SIZE + 4), load_font(FONT_SIZE)
        pictures = 2 * size[0] + MARGIN if beside else size[0]
        width = max(pictures, _BAR_WIDTH + 180) + 2 * MARGIN
        lines = wrap_text(self.sentence, subtitle, width - 2 * MARGIN) if self.sentence != self.word else []
        heading = wrap_text(self.word, title, width - 2 * MARGIN)
        line_height, title_height = FONT_SIZE + 6, FONT_SIZE + 12
        top = MARGIN + title_height * len(heading) + line_height * len(lines) + 4
        canvas = Image.new("RGB", (width, top + size[1] + 3 * MARGIN + FONT_SIZE), "white")
        pen = ImageDraw.Draw(canvas)
        for number, line in enumerate(heading):
            pen.text((MARGIN, MARGIN + number * title_height), line, fill="black", font=title)
        for number, line in enumerate(lines):
            place = (MARGIN, MARGIN + title_height * len(heading) + number * line_height)
            pen.text(place, line, fill="#555555", font=subtitle)
        if beside:
            canvas.paste(self.image.resize(size, Image.Resampling.BICUBIC), (MARGIN, top))
        canvas.paste(overlay, (width - MARGIN - size[0] if beside else MARGIN, top))
        draw_legend(canvas, top + size[1] + MARGIN)
        return canvas

    def save(self, path: str | Path) -> None:
        """Write the drawing; the ending says the format."""
        self.draw().save(path)

    def _mark_peak(self, picture: Image.Image, scale: float) -> None:
        x, y = (coordinate * scale for coordinate in self.peak())
        pen = ImageDraw.Draw(picture)
        # Two rings, so that one of them stands out from any background.
        for radius, colour in ((9, "black"), (7, "white")):
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), outline=colour, width=2)


def _overlay(image: Image.Image, values: np.ndarray, size: tuple[int, int]) -> Image.Image:
    lowest, highest = float(values.min()), float(values.max())
    spread = (values - lowest) / (highest - lowest) if highest > lowest else np.zeros_like(values)
    heat = Image.fromarray(spread.astype(np.float32)).resize(size, Image.Resampling.BICUBIC)
    strength = np.clip(np.asarray(heat), 0.0, 1.0)
    # The picture in grey, so that its colours are not taken for the map's.
    grey = np.asarray(image.convert("L").resize(size, Image.Resampling.BICUBIC), dtype=np.float32)[..., None]
    opacity = (0.45 + 0.3 * strength)[..., None]
    mixed = (1 - opacity) * grey + opacity * viridis(strength)
    return Image.fromarray(np.rint(mixed).astype(np.uint8))


def draw_legend(canvas: Image.Image, top: int) -> None:
    """The colours from less to more attention, at the left."""
    pen, font = ImageDraw.Draw(canvas), load_font(FONT_SIZE)
    ramp = viridis(np.broadcast_to(np.linspace(0, 1, _BAR_WIDTH), (FONT_SIZE, _BAR_WIDTH)))
    pen.text((MARGIN, top - 2), "less", fill="black", font=font)
    left = MARGIN + int(pen.textlength("less", font=font)) + 8
    canvas.paste(Image.fromarray(ramp), (left, top))
    pen.text((left + _BAR_WIDTH + 8, top - 2), "more attention", fill="black", font=font)


def stacked(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures one under another, at the left, on white."""
    canvas = Image.new("RGB", (max(one.width for one in pictures), sum(one.height for one in pictures)), "white")
    top = 0
    for one in pictures:
        canvas.paste(one, (0, top))
        top += one.height
    return canvas


def load_font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The font of every picture here: matplotlib's DejaVu Sans, which has the letters of most languages. Where
    matplotlib is not installed Pillow's own, which has those of English and little more."""
    file = _font_file()
    return ImageFont.load_default(size) if file is None else ImageFont.truetype(file, size)


@functools.cache
def _font_file() -> Path | None:
    found = importlib.util.find_spec("matplotlib")
    if found is None or found.origin is None:
        return None
    file = Path(found.origin).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"
    return file if file.is_file() else None


def wrap_text(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Lines no wider than `width`; a word that is wider by itself is broken."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
            continue
        while font.getlength(word) > width and len(word) > 1:
            fits = next(n for n in range(len(word) - 1, 0, -1) if n == 1 or font.getlength(word[:n]) <= width)
            lines.append(word[:fits])
            word = word[fits:]
        lines.append(word)
    return lines


@dataclass(frozen=True, eq=False)
class HeatmapGrid:
    """The maps of several words on one picture."""

    heatmaps: list[Heatmap]

    def draw(self) -> Image.Image:
        """The picture, then each word's map under its word, in rows, with a legend; RGB."""
        first = self.heatmaps[0]
        longer = max(first.image.size)
        scale = _GRID_SIDE / longer
        size = (max(1, round(first.image.width * scale)), max(1, round(first.image.height * scale)))
        columns = min(_GRID_COLUMNS, len(self.heatmaps) + 1)
        rows = -(-(len(self.heatmaps) + 1) // columns)
        font, label_height = load_font(FONT_SIZE), FONT_SIZE + 8
        width = max(columns * (size[0] + MARGIN) + MARGIN, _BAR_WIDTH + 180)
        lines = wrap_text(first.sentence, font, width - 2 * MARGIN)
        top = MARGIN + (FONT_SIZE + 6) * len(lines) + 4
        canvas = Image.new(
            "RGB", (width, top + rows * (size[1] + label_height + MARGIN) + 2 * MARGIN + FONT_SIZE), "white"
        )
        pen = ImageDraw.Draw(canvas)
        for number, line in enumerate(lines):
            pen.text((MARGIN, MARGIN + number * (FONT_SIZE + 6)), line, fill="#555555", font=font)
        tiles = [("", first.image.convert("RGB").resize(size, Image.Resampling.BICUBIC))]
        tiles += [(heatmap.word, _overlay(heatmap.image, heatmap.values, size)) for heatmap in self.heatmaps]
        for number, (word, tile) in enumerate(tiles):
            x = MARGIN + (number % columns) * (size[0] + MARGIN)
            y = top + (number // columns) * (size[1] + label_height + MARGIN)
            pen.text((x, y), _shortened(word, font, size[0]), fill="black", font=font)
            canvas.paste(tile, (x, y + label_height))
        draw_legend(canvas, canvas.height - FONT_SIZE - MARGIN)
        return canvas

    def save(self, path: str | Path) -> None:
        """Write the drawing; the ending says the format."""
        self.draw().save(path)


def _shortened(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """A label that is no wider than its tile."""
    if font.getlength(text) <= width:
        return text
    return next((f"{text[:n]}..." for n in range(len(text), 0, -1) if font.getlength(f"{text[:n]}...") <= width), "")
