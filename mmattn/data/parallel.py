"""One door to every parallel corpus that a config can name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from mmattn.data.gettext_catalogs import read_catalogs
from mmattn.data.office_help import open_office_help
from mmattn.data.pair_columns import PairColumns
from mmattn.data.pair_table import PairBuilder, PairFilter, PairTable
from mmattn.data.parallel_spec import OFFICE_HELP_WORDS, SPLITS, ParallelConfig, ParallelPart
from mmattn.data.scenes.translation import SceneTranslations
from mmattn.data.sentence_pairs import JoinedPairs, ParallelSource, spread
from mmattn.data.stream_pairs import StreamedPairs
from mmattn.data.stream_rows import StreamedRows
from mmattn.data.stream_shards import Row
from mmattn.data.tables import hub_split, load_hub, read_table, table_files
from mmattn.data.text_rows import aligned_lines, delimited_rows, json_rows, require_file
from mmattn.errors import DataError

_LINE_FORMATS = (".jsonl", ".ndjson", ".csv", ".tsv")


def open_parallel(spec: ParallelPart, split: str = "train") -> ParallelSource:
    """Opens a data set of sentence pairs, and looks every pair through.

    Args:
        spec: The `data:` section of a config, or one of its parts.
        split: "train", "validation", "test"; scenes also have "heldout". Data with only one other split, or none,
            gives that, or a part put aside, for both "validation" and "test".

    Raises:
        DataError: missing, empty, unreadable or with other columns, too many bad lines, or files of different length;
            the message says what to do.
    """
    if split not in SPLITS:
        raise DataError(f"unknown split {split!r}: use one of {', '.join(SPLITS)}")
    if isinstance(spec, ParallelConfig) and spec.parts:
        return JoinedPairs([open_parallel(part, split) for part in spec.parts])
    if spec.kind == "scenes":
        return _open_scenes(spec, split)
    if split == "heldout":
        raise DataError(f"data.kind={spec.kind} has no split 'heldout': use train, validation or test")
    if spec.streaming and split == "train":
        rows = StreamedRows(spec, limit=spec.limit, header=spec.header, quoting=spec.quoting)
        return StreamedPairs(rows, spec)
    if spec.streaming and spec.eval_path is None:
        raise DataError(f"streamed data has no pairs for split {split!r}: set data.eval_path")
    return _limited(_OPENERS[spec.kind](spec, split), spec, split)


def pair_builder(spec: ParallelPart, name: str) -> PairBuilder:
    """Checks pairs as a config asks for."""
    keeps = PairFilter(
        spec.min_words, spec.max_words, spec.max_ratio, bool(spec.drop_equal), bool(spec.drop_duplicates)
    )
    return PairBuilder(
        name,
        spec.src_lang,
        spec.tgt_lang,
        keeps=keeps,
        max_bad_fraction=spec.max_bad_fraction,
        max_bad=spec.max_bad,
    )


def part_of(table: PairTable, spec: ParallelPart, split: str, *, has_own: bool) -> PairTable:
    """The pairs of one split of a table.

    Args:
        table: All pairs that there are for training, or those for scores where they have files of their own.
        spec: How large a part is put aside.
        split: Which part is wanted.
        has_own: Whether scores have pairs of their own elsewhere.
    """
    if has_own or (spec.eval_fraction == 0 and split == "train"):
        return table
    if spec.eval_fraction == 0:
        raise DataError(f"{table.name} has no pairs for split {split!r}: set data.eval_path or data.eval_fraction")
    return table.split_off(spec.eval_fraction, spec.seed, wants_rest=split == "train")


def _limited(table: PairTable, spec: ParallelPart, split: str) -> PairTable:
    if spec.limit is not None and spec.limit < len(table):
        table = table.keep(range(spec.limit))
    if split != "train" and spec.eval_limit is not None and spec.eval_limit < len(table):
        table = table.keep(spread(len(table), spec.eval_limit))
    return table


def _open_scenes(spec: ParallelPart, split: str) -> ParallelSource:
    limits = [spec.limit] if split == "train" else [spec.limit, spec.eval_limit]
    size = min([spec.size if split == "train" else spec.eval_size, *(limit for limit in limits if limit is not None)])
    src_lang = spec.src_lang or ("de" if spec.tgt_lang == "en" else "en")
    tgt_lang = spec.tgt_lang or ("de" if src_lang == "en" else "en")
    return SceneTranslations(split, size, spec.seed, src_lang=src_lang, tgt_lang=tgt_lang)


def _open_office_help(spec: ParallelPart, split: str) -> PairTable:
    low, high = OFFICE_HELP_WORDS
    whole = dataclasses.replace(
        spec,
        src_lang=spec.src_lang or ("de" if spec.tgt_lang == "en" else "en"),
        tgt_lang=spec.tgt_lang or ("en" if spec.src_lang not in (None, "en") else "de"),
        min_words=low if spec.min_words is None else spec.min_words,
        max_words=high if spec.max_words is None else spec.max_words,
        drop_equal=spec.drop_equal is not False,
        drop_duplicates=spec.drop_duplicates is not False,
    )
    builder = pair_builder(whole, "office-help")
    return open_office_help(spec.path, builder, split, spec.seed)


def _open_files(spec: ParallelPart, split: str) -> PairTable:
    path = spec.path if split == "train" or spec.eval_path is None else spec.eval_path
    if path is None:
        raise DataError("data.kind=files needs data.path")
    table = _read_rows(spec, path, _file_rows(spec, path))
    return part_of(table, spec, split, has_own=spec.eval_path is not None)


def _file_rows(spec: ParallelPart, path: str) -> Iterator[Row]:
    files, suffix = table_files(path)
    if suffix not in _LINE_FORMATS:
        yield from _table_rows(read_table(path)[0])
        return
    for file in files:
        if suffix in (".csv", ".tsv"):
            delimiter = "," if suffix == ".csv" else "\t"
            rows = delimited_rows(file, delimiter, header=spec.header, quoting=spec.quoting)
        else:
            rows = json_rows(file)
        where = "" if len(files) == 1 else f"{file} "
        for number, row in rows:
            yield f"{where}line {number}", row


def _table_rows(table: Any) -> Iterator[Row]:
    """The rows of a datasets.Dataset, which stays on disk."""
    number = 0
    for batch in table.iter(batch_size=1000):
        for values in zip(*batch.values(), strict=True):
            number += 1
            yield f"row {number}", dict(zip(batch, values, strict=True))


def _open_aligned(spec: ParallelPart, split: str) -> PairTable:
    paths = spec.source_path, spec.target_path
    has_own = spec.eval_source_path is not None
    if split != "train" and has_own:
        paths = spec.eval_source_path, spec.eval_target_path
    source_path, target_path = paths
    if source_path is None or target_path is None:
        raise DataError("data.kind=aligned needs data.source_path and data.target_path")
    for path in paths:
        require_file(str(path))
    builder = pair_builder(spec, f"{source_path} + {target_path}")
    for number, source, target in aligned_lines(source_path, target_path):
        builder.add(f"line {number}", source, target)
    return part_of(builder.finish(), spec, split, has_own=has_own)


def _open_hub(spec: ParallelPart, split: str) -> PairTable:
    if spec.path is None:
        raise DataError("data.kind=hub needs data.path")
    tables = load_hub(spec.path, spec.hub_config, spec.revision)
    name, has_own = hub_split(tables, spec.path, split, spec.train_split, spec.eval_split)
    table = _read_rows(spec, f"{spec.path}/{name}", _table_rows(tables[name]))
    return part_of(table, spec, split, has_own=has_own)


def _open_gettext(spec: ParallelPart, split: str) -> PairTable:
    if spec.path is None:
        raise DataError("data.kind=gettext needs data.path: a .po or .mo file, or a folder such as /usr/share/locale")
    path = spec.path if split == "train" or spec.eval_path is None else spec.eval_path
    table = read_catalogs(path, pair_builder(spec, path))
    return part_of(table, spec, split, has_own=spec.eval_path is not None)


_OPENERS: dict[str, Callable[[ParallelPart, str], PairTable]] = {
    "files": _open_files,
    "aligned": _open_aligned,
    "hub": _open_hub,
    "office-help": _open_office_help,
    "gettext": _open_gettext,
}


def _read_rows(spec: ParallelPart, name: str, rows: Iterable[Row]) -> PairTable:
    builder, reader = pair_builder(spec, name), None
    for place, row in rows:
        if isinstance(row, DataError):
            builder.add_bad(place, str(row))
            continue
        if reader is None:
            reader = PairColumns(spec, name, list(row), row)
        builder.add(place, **reader.values(row))
    return builder.finish()
