"""Results as files: nothing is overwritten, and a file that is there is complete."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from mmattn.errors import MmattnError, RunError, UsageError


def check_new_file(path: Path, *, force: bool | None = None) -> None:
    """Raise `UsageError` unless a file can be made there.

    Args:
        path: the file; its folder must be there.
        force: the command's `--force`, which lets a file be overwritten; None where it has none.
    """
    if path.is_dir():
        raise UsageError(f"{path}: is a folder; choose another name")
    if path.exists() and not force:
        way = "" if force is None else ", or overwrite with --force"
        raise UsageError(f"{path}: exists already; nothing was written. Choose another name{way}")
    if not path.parent.is_dir():
        raise UsageError(f"{path}: the folder {path.parent} does not exist; make it first")
    check_writable(path.parent, path)


def check_writable(folder: Path, path: Path) -> None:
    """Raise `UsageError` where nothing can be made in a folder, before the work for `path` is done in vain.

    Args:
        folder: where the file goes; of one that is not there yet, the nearest above it that is.
        path: what is to be made, for the message.
    """
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir():
        raise UsageError(f"{path}: cannot be made, {folder} is a file; choose another name")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UsageError(f"{path}: the folder {folder} cannot be written to; choose another")


@contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """A file for bytes that is there when it is complete; until then, and after an error, it is called `PATH.part`.

    Raises:
        RunError: the disk refuses.
    """
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            yield file
        os.replace(part, path)
    except OSError as error:
        kept = f"not complete ({error.strerror}); what is done is in {part}"
        raise RunError(f"{path}: {kept if part.exists() else f'cannot be written ({error.strerror})'}") from error
    except MmattnError as error:
        if part.stat().st_size:
            raise type(error)(f"{error}; what is done is in {part}") from error
        part.unlink()
        raise
