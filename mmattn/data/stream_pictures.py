"""Pictures with texts that are read from shards while training."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmattn.data.images import open_image
from mmattn.data.records import ImageTextRecord, TextItem
from mmattn.data.spec import DataConfig
from mmattn.data.stream_rows import StreamedRows
from mmattn.data.stream_tar import PICTURES
from mmattn.data.tables import row_items, row_picture
from mmattn.errors import DataError


class StreamedPictures:
    """A source of which every row of its shards is a record.

    In a tar, a picture is what ends in jpg, jpeg, png or webp, and a text what stands in `text` of an example's json,
    or else ends in txt, unless `data.columns` says otherwise.

    Args:
        rows: The rows.
        spec: Which column holds what, and where relative paths of pictures start.
        default_image: The image column when `spec.columns` names none.

    Raises:
        DataError: a column that is not there.
    """

    def __init__(self, rows: StreamedRows, spec: DataConfig, *, default_image: str = "image") -> None:
        self.streamed_rows, self.columns, self.max_pixels = rows, spec.columns, spec.max_pixels
        self.image_root = None if spec.image_root is None else Path(spec.image_root)
        columns, present = spec.columns, rows.column_names()
        self.images: tuple[str, ...] = (columns.image or default_image,)
        self.texts_in: tuple[str, ...] = (columns.text,)
        if rows.is_tar:
            self._choose_in_tar(present)
        text = next((name for name in self.texts_in if name in present), self.texts_in[0])
        used: dict[str, str | None] = {"text": text, "question": columns.question, "kind": columns.kind}
        if len(self.images) == 1:
            used["image"] = self.images[0]
        rows.require_columns(used)
        others = (columns.question, columns.kind)
        self._text_columns = [*self.texts_in, *(column for column in others if column is not None)]

    def _choose_in_tar(self, present: Sequence[str]) -> None:
        columns, name = self.columns, self.streamed_rows.name
        has_pictures = any(ending in present for ending in PICTURES)
        if columns.image is None:
            self.images = PICTURES
            if not has_pictures:
                raise DataError(f"{name}: the first example holds no picture ({', '.join(PICTURES)}), only {present}")
        elif has_pictures and columns.image not in (*present, *PICTURES):
            raise DataError(
                f"{name} has no file {columns.image!r} in its first example: set data.columns.image=null, and pictures "
                f"are found by their endings ({', '.join(PICTURES)})"
            )
        if columns.text == "text":
            self.texts_in = ("text", "txt")

    @property
    def name(self) -> str:
        """Names the data set in messages."""
        return self.streamed_rows.name

    def __len__(self) -> int:
        return len(self.streamed_rows)

    def __getitem__(self, index: int) -> ImageTextRecord:
        """Record `index`.

        Raises:
            DataError: its row or its picture cannot be read, or it has no text.
            RunError: its shard is gone, or not what it was.
        """
        ((place, row),) = self.streamed_rows.rows([index], [*self.images, *self._text_columns])
        if isinstance(row, DataError):
            raise DataError(f"{place}: {row}")
        try:
            items = self._items(row)
        except DataError as error:
            raise DataError(f"{place}: {error}") from error
        if not items:
            raise DataError(f"{place}: column {self.texts_in[0]!r} holds no text")
        column = next((name for name in self.images if row.get(name) is not None), self.images[0])
        root = self.image_root or self.streamed_rows.shard_of(index).parent
        label, picture = row_picture(row.get(column), place, column, root)
        image = np.asarray(open_image(picture, name=label, max_pixels=self.max_pixels))
        return ImageTextRecord(label, image, tuple(items), {"rows": [index]})

    def texts(self, indices: Sequence[int]) -> list[tuple[TextItem, ...]]:
        """The texts of records, without reading pictures; none of a row that cannot be read."""
        rows = self.streamed_rows.rows(indices, self._text_columns)
        return [tuple(self._readable(row)) for _, row in rows]

    def _readable(self, row: Mapping[str, Any] | DataError) -> list[TextItem]:
        with contextlib.suppress(DataError):
            return [] if isinstance(row, DataError) else self._items(row)
        return []

    def _items(self, row: Mapping[str, Any]) -> list[TextItem]:
        found = (items for text in self.texts_in if (items := row_items(row, self.columns, text)))
        return next(found, [])
