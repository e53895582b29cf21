"""Bringing files and folders to the disk, for what has to be complete or absent after a crash."""

from __future__ import annotations

import os
from pathlib import Path


def sync_file(path: Path) -> None:
    """Bring a file's content to the disk."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Bring new names in a folder to the disk."""
    if os.name != "posix":  # elsewhere a folder cannot be opened
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Bring a folder with all that is in it to the disk."""
    paths = list(folder.rglob("*"))
    for path in paths:
        if path.is_file():
            sync_file(path)
    for path in [*(path for path in paths if path.is_dir()), folder]:
        sync_folder(path)
