"""Tables with a picture and texts in every row: the user's JSONL, CSV and Parquet files, image folders, hub ids."""

from __future__ import annotations

import difflib
import glob
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from mmattn.data.draws import draw_generator
from mmattn.data.images import MAX_PIXELS, open_image
from mmattn.data.records import ImageTextRecord, TextItem
from mmattn.data.text_rows import has_half_surrogate, json_rows
from mmattn.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

    from mmattn.data.spec import ColumnConfig

T = TypeVar("T")
_log = logging.getLogger(__name__)

_FORMATS = {
    ".jsonl": "json",
    ".json": "json",
    ".ndjson": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
}
_EVAL_SPLITS = ("validation", "test", "val", "dev")
_USUAL = {
    "image": ("image", "file_name", "img", "path", "jpg", "png"),
    "text": ("caption", "captions", "answer", "label"),
    "source": ("src", "source_text", "sentence1", "input"),
    "target": ("tgt", "trg", "target_text", "sentence2", "output"),
}


class TableSource:
    """Records from a table; a picture is opened when its record is asked for.

    Rows that show the same picture become one record with all their texts. Rows without text are left out.

    Args:
        table: A datasets.Dataset.
        columns: Which column holds what.
        name: Names the data set in messages.
        image_root: Folder of relative image paths.
        max_pixels: Larger pictures are refused.
        default_image: The image column when `columns.image` is None.

    Raises:
        DataError: a column that is not there, or no row with text.
    """

    def __init__(
        self,
        table: Dataset,
        columns: ColumnConfig,
        *,
        name: str,
        image_root: Path | None = None,
        max_pixels: int = MAX_PIXELS,
        default_image: str = "image",
    ) -> None:
        from datasets import Image as ImageFeature

        self._name, self.image_root, self.max_pixels, self.columns = name, image_root, max_pixels, columns
        self.image_column = columns.image or default_image
        if not table.num_rows:
            raise DataError(f"{name} is empty: no rows")
        used = {"image": self.image_column, "text": columns.text, "question": columns.question}
        used |= {"kind": columns.kind, "group": columns.group}
        for role, column in used.items():
            if column is not None and column not in table.column_names:
                raise DataError(missing_column(name, role, column, table.column_names))
        for role in ("text", "question", "kind"):
            if used[role] == self.image_column:
                raise DataError(
                    f"{name}: data.columns.{role} names the column of the pictures, {self.image_column!r}: a column is "
                    "one or the other"
                )
        if isinstance(table.features[self.image_column], ImageFeature):
            table = table.cast_column(self.image_column, ImageFeature(decode=False))
        self.table = table.select_columns(sorted({column for column in used.values() if column is not None}))
        self.rows = self._grouped()
        if not self.rows:
            raise DataError(f"{name} is empty: column {columns.text!r} holds no text in any of {table.num_rows} rows")

    @property
    def name(self) -> str:
        """Names the data set in messages."""
        return self._name

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> ImageTextRecord:
        """Record `index`.

        Raises:
            DataError: its picture cannot be read.
        """
        label, source = self.picture(self.rows[index][0])
        image = np.asarray(open_image(source, name=label, max_pixels=self.max_pixels))
        texts = tuple(item for row in self.rows[index] for item in self._items(self.table, row))
        return ImageTextRecord(label, image, texts, {"rows": self.rows[index]})

    def texts(self, indices: Sequence[int]) -> list[tuple[TextItem, ...]]:
        """The texts of records, without opening pictures."""
        chosen = [self.rows[index] for index in indices]
        table = self.table.remove_columns([self.image_column])
        return [tuple(item for row in rows for item in self._items(table, row)) for rows in chosen]

    def split_off(self, fraction: float, seed: int, *, wants_rest: bool) -> TableSource:
        """A part of the records, drawn by seed, or what that leaves; at least one record on each side.

        Raises:
            DataError: one record cannot be split.
        """
        if len(self.rows) < 2:
            raise DataError(
                f"{self.name}: one record cannot be split into training and evaluation; give data.eval_path"
            )
        count = min(max(1, round(fraction * len(self.rows))), len(self.rows) - 1)
        order = draw_generator(seed, 0, len(self.rows), "split").permutation(len(self.rows))
        chosen = order[count:] if wants_rest else order[:count]
        return self.keep(sorted(chosen.tolist()))

    def keep(self, indices: Sequence[int]) -> TableSource:
        """Only these records."""
        part = object.__new__(TableSource)
        part.__dict__.update(self.__dict__)
        part.rows = [self.rows[index] for index in indices]
        return part

    def _grouped(self) -> list[list[int]]:
        """Row numbers of each record, in the order of the table."""
        table, group, text_column = self.table, self.columns.group, self.columns.text
        by_path = getattr(table.features[self.image_column], "dtype", None) in ("string", "large_string")
        nothing = [None] * table.num_rows
        names = table[group][:] if group is not None else nothing
        paths = table[self.image_column][:] if by_path else nothing
        groups: dict[Any, list[int]] = {}
        without: list[int] = []
        for row, (name, path, text) in enumerate(zip(names, paths, table[text_column][:], strict=True)):
            if self._said_of(row, lambda text=text: _texts(text, text_column)):
                groups.setdefault(_group_key(row, name, path), []).append(row)
            else:
                without.append(row + 1)
        if without and groups:
            _log.warning(
                "%s: %d of %d rows have no text in column %r and are left out, the first is row %d",
                *(self._name, len(without), table.num_rows, text_column, without[0]),
            )
        return list(groups.values())

    def _items(self, table: Dataset, row: int) -> list[TextItem]:
        return self._said_of(row, lambda: row_items(table[row], self.columns, self.columns.text))

    def _said_of(self, row: int, read: Callable[[], list[T]]) -> list[T]:
        """What `read` gives; what is wrong with it is said of this row."""
        try:
            return read()
        except DataError as error:
            raise DataError(f"{self._name} row {row + 1}: {error}") from error

    def picture(self, row: int) -> tuple[str, Path | bytes]:
        """What to call the picture of a row of the table, and where it is.

        Raises:
            DataError: the row has none.
        """
        value = self.table[row][self.image_column]
        return row_picture(value, f"{self.name} row {row + 1}", self.image_column, self.image_root)


def row_picture(value: Any, place: str, column: str, root: Path | None) -> tuple[str, Path | bytes]:
    """What to call the picture that a row's image column holds, and where it is.

    Args:
        value: A path, bytes, or both as `datasets` has them.
        place: Where the row is.
        column: The column's name.
        root: Folder of relative paths.

    Raises:
        DataError: there is none.
    """
    if isinstance(value, dict):
        data, path = value.get("bytes"), value.get("path")
        if data is not None:
            return place + (f" ({path})" if path else ""), data
        value = path
    if isinstance(value, bytes):
        return place, value
    if not isinstance(value, str) or not value:
        kind = "nothing" if value is None or value == "" else f"a {type(value).__name__}"
        raise DataError(f"{place}: column {column!r} holds {kind}, not a picture")
    if "://" in value:
        raise DataError(f"{place}: {value} is an address; download the pictures first")
    path = Path(value) if root is None else root / value
    return str(path), path


def row_items(row: Mapping[str, Any], columns: ColumnConfig, text_column: str) -> list[TextItem]:
    """The texts of a row; a column that it lacks counts as empty.

    Raises:
        DataError: what stands in a column is no text.
    """
    question = _as_text(row.get(columns.question), columns.question) if columns.question else ""
    kind = _as_text(row.get(columns.kind), columns.kind) if columns.kind else ""
    kind = kind or ("answer" if question else "caption")
    return [TextItem(text, question or None, kind) for text in _texts(row.get(text_column), text_column)]


def _texts(value: Any, column: str) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return [text for item in values if (text := _as_text(item, column))]


def _as_text(value: Any, column: str) -> str:
    """A text without outer spaces, empty where there is none; numbers and truth values are written out."""
    if value is None or value != value:  # what is missing in a column of numbers is NaN
        return ""
    if not isinstance(value, str | int | float):
        raise DataError(f"column {column!r} holds {type(value).__name__}, not text")
    text = str(value).strip()
    if has_half_surrogate(text):
        raise DataError(f"column {column!r} holds half of a surrogate pair, which is no character")
    return text


def _group_key(row: int, name: Any, path: str | None) -> tuple[str, Any]:
    """What rows that show one picture have in common; a row that names neither group nor path stays alone."""
    pairs = (("group", name), ("path", path))
    return next((pair for pair in pairs if pair[1] not in (None, "")), ("row", row))


def missing_column(name: str, role: str, column: str, present: Sequence[str]) -> str:
    """The message for a column that a table does not have; `role` is its key under `data.columns`."""
    near = difflib.get_close_matches(column, present, n=1, cutoff=0.6)
    near = near or [other for other in _USUAL.get(role, ()) if other in present]
    hint = f"; nearest: {near[0]!r}" if near else ""
    columns = ", ".join(repr(other) for other in present)
    return f"{name} has no column {column!r}, it has {columns}{hint}; set data.columns.{role}"


def table_files(path: str) -> tuple[list[str], str]:
    """The files that a path or glob means, and what they end in: ".csv".

    Raises:
        DataError: no such file, another kind of file, or nothing in it.
    """
    files = named_files(path)
    if not files or not Path(files[0]).is_file():
        kind = "is a folder, not a file" if Path(path).is_dir() else "no such file"
        raise DataError(f"{path}: {kind}; set data.path to a JSONL, CSV or Parquet file")
    suffix = Path(files[0]).suffix.lower()
    if suffix not in _FORMATS:
        raise DataError(f"{path}: unknown kind of table {suffix!r}: use {', '.join(_FORMATS)}")
    if not any(Path(file).stat().st_size for file in files):
        raise DataError(f"{path} is empty: no rows")
    return files, suffix


def named_files(path: str) -> list[str]:
    """The files that a glob means, sorted; a path of which there is a file means that, whatever is in its name."""
    is_glob = glob.has_magic(path) and not Path(path).exists()
    return sorted(glob.glob(path, recursive=True)) if is_glob else [path]


def read_table(path: str) -> tuple[Dataset, Path]:
    """A JSONL, CSV, TSV or Parquet file, or a glob of them, and the folder it lies in.

    Whatever stands in a CSV or TSV file is text, as it was written: "007", "NA" and "None" too.

    Raises:
        DataError: no such file, another kind of file, nothing in it, or not readable as what its name says.
    """
    from datasets import load_dataset

    files, suffix = table_files(path)
    names = [glob.escape(file) for file in files]  # datasets takes every name for a glob
    try:
        options = _text_columns(files, suffix) if _FORMATS[suffix] == "csv" else {}
        table = load_dataset(_FORMATS[suffix], data_files=names, split="train", **options)
    except DataError:
        raise
    except Exception as error:  # datasets lets through what pandas, pyarrow and its own builders raise
        if "corresponds to no data" in str(error):
            raise DataError(f"{path} is empty: no rows") from error
        bad_line = _bad_line(files) if suffix in (".jsonl", ".ndjson") else None
        raise DataError(bad_line or f"{path}: cannot be read as {_FORMATS[suffix]} ({root_cause(error)})") from error
    return table, Path(files[0]).parent


def _text_columns(files: Sequence[str], suffix: str) -> dict[str, Any]:
    """What makes `datasets` read a CSV or TSV file without guessing what its columns are.

    Raises:
        DataError: a first row of more fields than there are columns, of which pandas makes names of rows.
    """
    import pandas
    from datasets import Features, Value

    delimiter = "\t" if suffix == ".tsv" else ","
    names: dict[str, None] = {}
    for file in files:
        first = pandas.read_csv(file, sep=delimiter, nrows=1, dtype=str)
        if not isinstance(first.index, pandas.RangeIndex):
            raise DataError(
                f"{file}: its first row has {first.index.nlevels + len(first.columns)} fields, and there are "
                f"{len(first.columns)} columns; put quote marks around texts that hold a delimiter"
            )
        names |= dict.fromkeys(map(str, first.columns))
    features = Features({name: Value("string") for name in names})
    return {"sep": delimiter, "features": features, "keep_default_na": False}


def _bad_line(files: Sequence[str]) -> str | None:
    """The first line that keeps JSONL files from being read, if lines are to blame."""
    for file in files:
        for number, row in json_rows(file):
            problem = str(row) if isinstance(row, DataError) else None
            if problem is None and has_half_surrogate(json.dumps(row, ensure_ascii=False)):
                problem = "half of a surrogate pair, which is no character"
            if problem is not None:
                return f"{file} line {number}: {problem}"
    return None


def load_hub(path: str, name: str | None = None, revision: str | None = None) -> DatasetDict:
    """Every split of a data set on the Hugging Face hub, or of a folder in its layout or written by `save_to_disk`.

    Args:
        path: Id or folder.
        name: The data set's configuration.
        revision: Branch, tag or commit.

    Raises:
        DataError: it cannot be loaded, or has no splits.
    """
    from datasets import DatasetDict, load_dataset, load_from_disk

    is_saved = any((Path(path) / file).is_file() for file in ("state.json", "dataset_dict.json"))
    if is_saved and (name, revision) != (None, None):
        raise DataError(
            f"{path} was saved to disk, where there are no data.hub_config and data.revision: leave them out"
        )
    try:
        tables = load_from_disk(path) if is_saved else load_dataset(path, name, revision=revision)
    except Exception as error:  # network, access, missing id, unsupported layout: each with a class of its own
        first = str(error).strip().splitlines()
        reason = first[0] if first else root_cause(error)
        raise DataError(
            f"{path}: cannot be loaded with datasets ({reason}); check data.path and the network"
        ) from error
    if is_saved and not isinstance(tables, DatasetDict):
        return DatasetDict({"train": tables})
    if not isinstance(tables, DatasetDict) or not tables:
        raise DataError(f"{path} is empty: no splits")
    return tables


def hub_split(tables: DatasetDict, path: str, split: str, train_split: str, eval_split: str | None) -> tuple[str, bool]:
    """The name of the split to use, and whether the data set has one of its own for scores.

    Raises:
        DataError: the split that is asked for is not there.
    """
    name = train_split
    if split != "train":
        name = eval_split or next((name for name in (split, *_EVAL_SPLITS) if name in tables), train_split)
    if name not in tables:
        raise DataError(
            f"{path} has no split {name!r}, it has {', '.join(map(str, tables))}; set data.train_split, data.eval_split"
        )
    return name, any(other in tables and other != train_split for other in (eval_split, *_EVAL_SPLITS))


def root_cause(error: BaseException) -> str:
    """The first line of the error that started a chain, of which what was tried in its place is no part."""
    cause = error.__cause__ or error.__context__
    while cause is not None:
        error, cause = cause, cause.__cause__
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
