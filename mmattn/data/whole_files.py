"""Files that are complete or absent, and built by one process at a time."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mmattn._durable import sync_folder
from mmattn.errors import RunError

_LOGGER = logging.getLogger(__name__)


@contextlib.contextmanager
def build_lock(path: Path) -> Iterator[None]:
    """One process at a time builds `path`; the lock ends with its process, however that ends.

    Raises:
        OSError: the lock's file cannot be written.
    """
    if os.name != "posix":
        yield
        return
    import fcntl

    with open(path.with_name(f".lock-{path.name}"), "w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            _LOGGER.warning("waiting for another process that builds the cache %s", path)
            fcntl.lockf(file, fcntl.LOCK_EX)
        yield


def kept_array(
    folder: Path, key: Sequence[Any], write: Callable[[BinaryIO], None], dtype: type[np.integer], setting: str
) -> np.ndarray:
    """An array of numbers in a file, mapped from it; written if it is not there.

    Of several processes that ask at once one writes, and the others wait.

    Args:
        folder: Where such files lie.
        key: All that decides what is in it, as JSON values.
        write: Writes the numbers; what it raises goes through, and leaves no file.
        dtype: Of the numbers.
        setting: Which setting names the folder, for messages.

    Raises:
        RunError: the disk is full or cannot be written, or the file cannot be mapped.
    """
    path = folder / hashlib.sha256(json.dumps(list(key), sort_keys=True).encode()).hexdigest()[:32]
    if not path.exists():
        with _writing(path, setting):
            folder.mkdir(parents=True, exist_ok=True)
            with build_lock(path):
                if not path.exists():
                    _write_whole(path, write)
            path.with_name(f".lock-{path.name}").unlink(missing_ok=True)
    try:
        return np.memmap(path, dtype=dtype, mode="r")
    except (OSError, ValueError) as error:  # numpy has a ValueError for a file of 0 bytes, or of half a number
        raise RunError(f"cannot read {path}: {_unread(error)}") from error


def _unread(error: OSError | ValueError) -> str:
    if isinstance(error, OSError):
        advice = "allow more (ulimit -n)" if is_too_many_open(error) else "mend that"
        return f"{error.strerror or error}; {advice}"
    return f"{error}; delete it, and it is made again"


def is_too_many_open(error: OSError) -> bool:
    """Whether the limit on open files was met, of the process or of the machine."""
    return error.errno in (errno.EMFILE, errno.ENFILE)


def _write_whole(path: Path, write: Callable[[BinaryIO], None]) -> None:
    unfinished = path.with_name(f".building-{path.name}")
    with open(unfinished, "w+b") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.rename(unfinished, path)
    sync_folder(path.parent)


@contextlib.contextmanager
def _writing(path: Path, setting: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason, advice = error.strerror or str(error), "mend that"
        if error.errno == errno.ENOSPC:
            reason, advice = "the disk is full", "make room"
        raise RunError(f"cannot write {path}: {reason}; {advice}, or set {setting} to another folder") from error
