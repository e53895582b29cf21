"""Drawn pictures as PNG files: readable names, and in each file how it was made."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from mmattn.errors import RunError, UsageError
from mmattn.inference.files import check_writable, new_file

_LONGEST = 60  # characters of a prompt in a name


def picture_paths(output: Path, prompts: Sequence[str], seeds: Sequence[int]) -> list[Path]:
    """Where the pictures go: `FOLDER/a-red-circle-seed0.png`, or the file itself for a single one.

    Args:
        output: a folder, or a file that ends in .png.
        prompts: the prompt of each picture.
        seeds: the seed of each picture.

    Raises:
        UsageError: one file for several pictures, another format, or a file where a folder is meant.
    """
    if output.suffix.lower() == ".png":
        if len(prompts) != 1:
            raise UsageError(
                f"--output {output}: is one file, but {len(prompts)} pictures are to be drawn: name a folder"
            )
        return [output]
    if output.suffix.lower() in Image.registered_extensions():
        raise UsageError(f"--output {output}: pictures are written as PNG: let it end in .png, or name a folder")
    if output.exists() and not output.is_dir():
        raise UsageError(f"--output {output}: is a file; name a folder, or a file that ends in .png")
    paths = []
    seen: Counter[str] = Counter()
    for prompt, seed in zip(prompts, seeds, strict=True):
        stem = f"{slug(prompt)}-seed{seed}"
        seen[stem] += 1
        paths.append(output / (f"{stem}.png" if seen[stem] == 1 else f"{stem}-{seen[stem]}.png"))
    return paths


def slug(text: str) -> str:
    """The words of a text as part of a file's name; letters of every script stay."""
    words = re.findall(r"\w+", text.lower())
    name = ""
    for word in words:
        longer = f"{name}-{word}" if name else word[:_LONGEST]
        if len(longer) > _LONGEST:
            break
        name = longer
    return name or "picture"


def check_paths(paths: Sequence[Path], *, may_overwrite: bool) -> None:
    """Raise `UsageError` unless all files can be made; to be called before work begins.

    Args:
        paths: of the pictures; their folder need not be there.
        may_overwrite: files that are there are replaced.
    """
    there = [path for path in paths if path.exists()]
    if there and not may_overwrite:
        more = f" and {len(there) - 1} more" if len(there) > 1 else ""
        raise UsageError(
            f"{there[0]}{more}: exists already; nothing was drawn. Choose another --output, or overwrite with --force"
        )
    for path in paths:
        if path.is_dir():
            raise UsageError(f"{path}: is a folder; choose another name")
        check_writable(path.parent, path)


def save_picture(image: Image.Image, path: Path, facts: Mapping[str, object]) -> None:
    """Write a PNG whose text chunks say how it was made (`Image.open(path).text`); the file is complete or absent.

    Raises:
        RunError: the disk refuses.
    """
    texts = PngInfo()
    for name, value in facts.items():
        texts.add_text(name, str(value))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{path.parent}: cannot be made ({error.strerror})") from error
    with new_file(path) as file:
        image.save(file, format="PNG", pnginfo=texts)
