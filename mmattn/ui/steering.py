"""What a visitor writes to steer a picture: weights of words, regions of phrases. And how it looks."""

from __future__ import annotations

import re

from PIL import Image, ImageDraw

from mmattn.errors import UsageError
from mmattn.maps.draw import load_font
from mmattn.ui.handlers import bounded

Box = tuple[float, float, float, float]
"""Left, top, right and bottom in fractions of the picture."""

_LONGER_SIDE = 320  # of the drawing of regions
_COLOURS = ("#fde725", "#5ec962", "#21918c", "#3b528b", "#440154")  # even steps of viridis
_LINE = re.compile(r"(?P<phrase>[^=:]*\S)\s*[=:]\s*(?P<rest>.+)")


def read_weights(text: str | None) -> dict[str, float]:
    """Words and their weights, one a line: `red = 1.6`.

    Raises:
        UsageError: too much, a line that says something else, or a word that is there twice.
    """
    found: dict[str, float] = {}
    for phrase, rest, where in _lines(text, "weights", "red = 1.6"):
        found[phrase] = _numbers(rest, 1, where, "a word, = and a number: red = 1.6")[0]
    return found


def read_regions(text: str | None) -> dict[str, Box]:
    """Phrases and their boxes, one a line: `a red circle = 0, 0, 0.5, 1`.

    Raises:
        UsageError: too much, a line that says something else, or a phrase that is there twice.
    """
    found: dict[str, Box] = {}
    for phrase, rest, where in _lines(text, "regions", "a red circle = 0, 0, 0.5, 1"):
        expected = "a phrase, = and left, top, right, bottom from 0 to 1: a red circle = 0, 0, 0.5, 1"
        left, top, right, bottom = _numbers(rest, 4, where, expected)
        found[phrase] = (left, top, right, bottom)
    return found


def region_line(phrase: str, one: tuple[float, float], other: tuple[float, float]) -> str:
    """The line of a box between two opposite corners, (x, y) in fractions of the picture."""
    (left, right), (top, bottom) = sorted((one[0], other[0])), sorted((one[1], other[1]))
    return f"{phrase} = {left:.2f}, {top:.2f}, {right:.2f}, {bottom:.2f}"


def draw_regions(regions: dict[str, Box], size: tuple[int, int], corner: tuple[float, float] | None) -> Image.Image:
    """The boxes on an empty picture.

    Args:
        regions: phrases with their boxes.
        size: height and width of the pictures that are drawn.
        corner: (x, y) in fractions: the first corner of a box under way.
    """
    scale = _LONGER_SIDE / max(size)
    height, width = (max(1, round(side * scale)) for side in size)
    canvas = Image.new("RGB", (width, height), "#e5e7eb")
    pen, font = ImageDraw.Draw(canvas), load_font(14)
    for eighth in range(1, 8):
        pen.line((width * eighth / 8, 0, width * eighth / 8, height), fill="#d1d5db")
        pen.line((0, height * eighth / 8, width, height * eighth / 8), fill="#d1d5db")
    for number, (phrase, (left, top, right, bottom)) in enumerate(regions.items()):
        box = (left * width, top * height, max(right * width - 1, left * width), max(bottom * height - 1, top * height))
        pen.rectangle(box, outline=_COLOURS[number % len(_COLOURS)], width=4)
        pen.text((box[0] + 8, box[1] + 6), phrase, fill="black", font=font)
    if corner is not None:
        x, y = corner[0] * width, corner[1] * height
        pen.ellipse((x - 5, y - 5, x + 5, y + 5), fill="black", outline="white", width=2)
    return canvas


def _lines(text: str | None, what: str, example: str) -> list[tuple[str, str, str]]:
    """Phrase, what is said of it, and where that is; blank lines aside."""
    found: list[tuple[str, str, str]] = []
    phrases: set[str] = set()
    for number, line in enumerate(bounded(text or "", f"field of {what}").splitlines(), 1):
        if not line.strip():
            continue
        where = f"{what}, line {number}, {line.strip()!r}"
        match = _LINE.fullmatch(line.strip())
        if match is None:
            raise UsageError(f"{where}: write it as in {example}")
        if match["phrase"] in phrases:
            raise UsageError(f"{where}: {match['phrase']!r} is there already")
        phrases.add(match["phrase"])
        found.append((match["phrase"], match["rest"], where))
    return found


def _numbers(text: str, count: int, where: str, expected: str) -> list[float]:
    parts = [part for part in re.split(r"[\s,]+", text.strip()) if part]
    try:
        numbers = [float(part) for part in parts]
    except ValueError:
        numbers = []
    if len(numbers) != count:
        raise UsageError(f"{where}: write {expected}")
    return numbers
