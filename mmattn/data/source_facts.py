"""What tells one data set from another, or from itself after its files were changed: for the names of caches."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmattn.data.captions import CheckedSource
from mmattn.data.images import MAX_PIXELS
from mmattn.data.records import ImageTextSource, read_texts
from mmattn.data.scenes import SceneDataset
from mmattn.data.skipping import SkippingSource
from mmattn.data.stamps import StampsSource
from mmattn.data.tables import TableSource
from mmattn.errors import DataError

_ENDS = 4096  # bytes of an embedded picture that are compared at its start and at its end


def source_facts(source: ImageTextSource) -> dict[str, Any]:
    """A source's name, size and a hash of its pictures and captions, as JSON values.

    Of picture files path, size and time of change are hashed, of embedded pictures their length and both ends; only
    pictures of a source that mmattn does not know are opened.
    """
    facts: dict[str, Any] = {"name": source.name, "examples": len(source)}
    while isinstance(source, SkippingSource | CheckedSource):
        if isinstance(source, SkippingSource):
            facts["substitutes"] = source.seed
        source = source.source
    if isinstance(source, TableSource) and source.max_pixels != MAX_PIXELS:
        facts["max_pixels"] = source.max_pixels  # which pictures have substitutes
    digest = hashlib.sha256()
    for item in _pictures(source):
        digest.update(repr(item).encode())
    if not isinstance(source, SceneDataset):
        for index in range(len(source)):
            digest.update(repr(read_texts(source, [index])).encode())
    return {**facts, "content": digest.hexdigest()}


def _pictures(source: ImageTextSource) -> Iterator[object]:
    if isinstance(source, SceneDataset):
        yield source.split, source.seed, source.image_size, source.max_objects
    elif isinstance(source, StampsSource):
        yield from (_file(stamp.path) for stamp in source.stamps)
    elif isinstance(source, TableSource):
        yield from (_table_picture(source, rows[0]) for rows in source.rows)
    else:
        yield from (source[index].image.tobytes() for index in range(len(source)))


def _table_picture(source: TableSource, row: int) -> object:
    try:
        _, where = source.picture(row)
    except DataError as error:
        return str(error)
    return _file(where) if isinstance(where, Path) else (len(where), where[:_ENDS], where[-_ENDS:])


def _file(path: Path) -> object:
    try:
        status = path.stat()
    except OSError:
        return str(path), "missing"
    return str(path), status.st_size, status.st_mtime_ns
