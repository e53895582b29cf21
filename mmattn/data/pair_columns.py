"""From a table's rows to sentence pairs: which column holds what."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmattn.data.parallel_spec import ParallelColumns, ParallelPart
from mmattn.data.tables import missing_column
from mmattn.errors import DataError


class PairColumns:
    """Takes pairs out of rows, by the columns that the first row has.

    Raises:
        DataError: a column that is not there, or a `translation` column without languages to take from it.
    """

    def __init__(self, spec: ParallelPart, name: str, present: Sequence[str], first: dict[str, Any]) -> None:
        columns: ParallelColumns = spec.columns
        self.others = {
            key: column
            for key in ("src_lang", "tgt_lang", "alignment", "kind")
            if (column := getattr(columns, key)) is not None
        }
        self.languages: tuple[str, str] | None = None
        self.sides = {"source": columns.source, "target": columns.target}
        entries = first.get("translation", "")
        # None where only the first row has no translation.
        is_by_language = isinstance(entries, dict) or (entries is None and not {"source", "target"} & set(present))
        if columns.source is None and columns.target is None and is_by_language:
            self.languages = self._translation_languages(spec, name, entries)
        else:
            usual = ("source", "target") if spec.header or "1" not in present else ("1", "2")
            for side, default in zip(self.sides, usual, strict=True):
                self.sides[side] = self.sides[side] or default
        used = self.others if self.languages else {**self.sides, **self.others}
        for role, column in used.items():
            if column not in present:
                raise DataError(missing_column(name, role, str(column), present))

    def _translation_languages(self, spec: ParallelPart, name: str, entries: dict[str, Any] | None) -> tuple[str, str]:
        known = ", ".join(entries) if entries else "not seen yet"
        if spec.src_lang is None or spec.tgt_lang is None:
            raise DataError(
                f"{name} has texts by language ({known}) in column 'translation': set data.src_lang and data.tgt_lang"
            )
        for language in (spec.src_lang, spec.tgt_lang):
            if entries is not None and language not in entries:
                raise DataError(f"{name} has no language {language!r} in column 'translation', it has {known}")
        return spec.src_lang, spec.tgt_lang

    @property
    def used(self) -> dict[str, str | None]:
        """The columns that are read, by their key under `data.columns`."""
        return {**({"source": "translation"} if self.languages else self.sides), **self.others}

    def values(self, row: dict[str, Any]) -> dict[str, Any]:
        """What `PairBuilder.add` takes."""
        if self.languages is not None:
            entries = row.get("translation") or {}
            source, target = (entries.get(language) for language in self.languages)
        else:
            source, target = (row.get(str(column)) for column in self.sides.values())
        others = {key: row.get(column) for key, column in self.others.items()}
        return {"source": source, "target": target, **others}
