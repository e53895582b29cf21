"""Real pictures with captions: the stamps of Tux Paint, from the Debian package `tuxpaint-stamps-default`.

Photographs and drawings, cut out, with a caption each ("A blackbird.") in folders that are families
(animals/mammals/deer). Nothing of it is part of mmattn: the reader opens the installed or unpacked package.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from mmattn.data.images import open_image
from mmattn.data.records import ImageTextRecord, TextItem
from mmattn.errors import DataError, UsageError

QUESTION = "what kind of thing is this?"
SPLITS = ("train", "validation", "test")
INSTALLED = Path("/usr/share/tuxpaint/stamps")
HINT = (
    "install it (apt-get install tuxpaint-stamps-default), or unpack it "
    "(apt-get download tuxpaint-stamps-default; dpkg-deb -x tuxpaint-stamps-default_*.deb stamps) "
    "and set data.path=stamps"
)
_LEFT_OUT = "symbols"  # letters, digits and signs
_STYLES = ("cartoon", "toys", "plastic")  # folders that say how a thing is drawn, not what it is
_SHARES = {"test": 0.15, "validation": 0.1}
_SPELLING = {"naturalforces": "natural forces"}


@dataclass(frozen=True)
class Stamp:
    """One picture file with its English caption, category ("animals") and family ("animals/mammals/deer")."""

    path: Path
    caption: str
    category: str
    family: str


class StampsSource:
    """The stamps as records: a caption, and the category as the answer to a question.

    A family, and a caption wherever it stands, lies wholly in one split. The largest group of each category is for
    training, so that every category that is asked about in a test was seen.

    Args:
        path: The stamps folder, or where the package was unpacked; None for the installed package.
        split: "train", "validation" or "test".
        seed: Of the split.

    Raises:
        DataError: the stamps are not there.
        UsageError: an unknown split.
    """

    def __init__(self, path: str | Path | None = None, split: str = "train", seed: int = 0) -> None:
        if split not in SPLITS:
            raise UsageError(f"unknown stamps split {split!r}: use one of {', '.join(SPLITS)}")
        self.split = split
        self.stamps = split_stamps(list_stamps(find_stamps(path)), seed)[split]

    @property
    def name(self) -> str:
        """Names the data set in messages."""
        return f"stamps/{self.split}"

    def __len__(self) -> int:
        return len(self.stamps)

    def __getitem__(self, index: int) -> ImageTextRecord:
        """Record `index`; raises DataError when its file is damaged."""
        stamp = self.stamps[index]
        extra = {"category": stamp.category, "family": stamp.family}
        return ImageTextRecord(f"{stamp.family}/{stamp.path.name}", cut_out(stamp.path), _items(stamp), extra)

    def texts(self, indices: Sequence[int]) -> list[tuple[TextItem, ...]]:
        """The texts of records, without opening pictures."""
        return [_items(self.stamps[index]) for index in indices]


def _items(stamp: Stamp) -> tuple[TextItem, ...]:
    return (TextItem(stamp.caption), TextItem(stamp.category, QUESTION, "category"))


def find_stamps(path: str | Path | None) -> Path:
    """The folder that holds the families.

    Raises:
        DataError: it is not there; the message says how to get it.
    """
    candidates = [INSTALLED] if path is None else [Path(path) / "usr/share/tuxpaint/stamps", Path(path)]
    for folder in candidates:
        if (folder / "animals").is_dir():
            return folder
    where = "the package tuxpaint-stamps-default is not installed" if path is None else f"{path} holds no stamps"
    raise DataError(f"{where}: {HINT}")


def list_stamps(folder: Path) -> list[Stamp]:
    """Every picture with a caption, but for letters and signs, sorted by path."""
    stamps = []
    for picture in sorted(folder.rglob("*.png")):
        parts = picture.relative_to(folder).parts[:-1]
        text = picture.with_suffix(".txt")
        if not parts or parts[0] == _LEFT_OUT or not text.is_file():
            continue
        caption = text.read_text(encoding="utf-8", errors="replace").split("\n", 1)[0].strip()
        family = "/".join(part for part in parts if part not in _STYLES)
        if caption:
            stamps.append(Stamp(picture, caption, _SPELLING.get(parts[0], parts[0]), family))
    if not stamps:
        raise DataError(f"{folder} holds no pictures with captions: {HINT}")
    return stamps


def split_stamps(stamps: Sequence[Stamp], seed: int) -> dict[str, list[Stamp]]:
    """Stamps by split; a family or caption never lies in two."""
    by_category: dict[str, list[list[Stamp]]] = {}
    parts: dict[str, list[Stamp]] = {split: [] for split in SPLITS}
    for group in _groups(sorted(stamps, key=lambda stamp: stamp.path)):
        categories = {stamp.category for stamp in group}
        if len(categories) > 1:  # a caption that ties two categories: nothing to be tested on
            parts["train"] += group
        else:
            by_category.setdefault(categories.pop(), []).append(group)
    for groups in by_category.values():
        total = sum(len(group) for group in groups)
        largest = max(groups, key=len)
        parts["train"] += largest
        taken = dict.fromkeys(_SHARES, 0)
        for group in sorted((group for group in groups if group is not largest), key=lambda one: _rank(one, seed)):
            wanting = [split for split, share in _SHARES.items() if taken[split] + len(group) / 2 <= share * total]
            split = wanting[0] if wanting else "train"
            parts[split] += group
            if wanting:
                taken[split] += len(group)
    return {split: sorted(part, key=lambda stamp: stamp.path) for split, part in parts.items()}


def _groups(stamps: Sequence[Stamp]) -> list[list[Stamp]]:
    """Stamps that a family or a caption ties together."""
    leader = {}

    def find(key: str) -> str:
        while leader.setdefault(key, key) != key:
            key = leader[key]
        return key

    for stamp in stamps:
        leader[find(f"caption {stamp.caption.casefold()}")] = find(f"family {stamp.family}")
    groups: dict[str, list[Stamp]] = {}
    for stamp in stamps:
        groups.setdefault(find(f"family {stamp.family}"), []).append(stamp)
    return list(groups.values())


def _rank(group: list[Stamp], seed: int) -> bytes:
    return hashlib.blake2b(f"{seed}/{min(stamp.family for stamp in group)}".encode(), digest_size=8).digest()


def cut_out(path: Path) -> np.ndarray:
    """A stamp without its empty border, on white: uint8 [H, W, 3]; raises DataError when it cannot be read."""
    try:
        with Image.open(path) as image:
            alpha = image.convert("RGBA").getchannel("A")
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{path}: damaged picture ({error})") from error
    box = alpha.getbbox()
    picture = open_image(path)
    return np.asarray(picture.crop(box) if box is not None else picture)
