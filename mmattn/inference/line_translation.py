"""Files and streams of text, a line in and a line out, of any length: what `mmattn translate` runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from mmattn.data.text_rows import decoded_line
from mmattn.errors import DataError, UsageError
from mmattn.inference.sources import make_plan
from mmattn.inference.translation import Translated
from mmattn.inference.translator import Translator

_CHUNK = 1 << 16  # bytes; enough lines to sort by length, few enough to see progress
_NAMED = 20  # bad lines that are named; the others are counted


class ByteStream(Protocol):
    """What lines are read from: a file opened for bytes, or `sys.stdin.buffer`."""

    def read1(self, size: int = ..., /) -> bytes:
        """At most so many bytes, those that are there."""
        ...


def line_chunks(stream: ByteStream) -> Iterator[list[bytes]]:
    """Lines without their ends, as many at a time as have come: from a terminal or a slow pipe no line waits."""
    rest = b""
    while data := stream.read1(_CHUNK):
        *lines, rest = (rest + data).split(b"\n")
        if lines:
            yield lines
    if rest:
        yield [rest]


class OutputFormat:
    """How a translation is written: its text, with columns for what else was asked for, or a JSON object.

    Args:
        as_json: `{"source", "translation", "score", "source_words", "target_words", "alignment"}`, the latter four
            where they were asked for. Else text, tab, score, tab, alignment as "0-0 1-2" (source word, target word).
        with_scores, with_alignment: what was asked for.
    """

    def __init__(self, *, as_json: bool = False, with_scores: bool = False, with_alignment: bool = False) -> None:
        self.as_json, self.with_scores, self.with_alignment = as_json, with_scores, with_alignment

    def __call__(self, source: str, found: str | Translated) -> str:
        """One translation; without line breaks where the source has none."""
        result = Translated(found) if isinstance(found, str) else found
        text = result.text if "\n" in source else " ".join(result.text.splitlines())
        if self.as_json:
            return json.dumps({"source": source, "translation": text} | self._extras(result), ensure_ascii=False)
        columns = [text]
        if self.with_scores:
            columns.append(f"{result.score or 0.0:.4f}")
        if self.with_alignment:
            pairs = result.alignment.pairs() if result.alignment is not None else []
            columns.append(" ".join(f"{source}-{target}" for source, target in pairs))
        return columns[0] if len(columns) == 1 else "\t".join(" ".join(column.split()) for column in columns)

    def of_bad(self, reason: str) -> str:
        """What stands for a line that could not be translated."""
        return json.dumps({"source": None, "translation": None, "error": reason}) if self.as_json else ""

    def _extras(self, result: Translated) -> dict[str, Any]:
        extras: dict[str, Any] = {"score": result.score or 0.0} if self.with_scores else {}
        if self.with_alignment:
            alignment = result.alignment
            extras |= {
                "source_words": alignment.source if alignment is not None else [],
                "target_words": alignment.target if alignment is not None else [],
                "alignment": alignment.pairs() if alignment is not None else [],
            }
        return extras


class LineTranslator:
    """Translates line after line; one that cannot be is named by its number and does not end the others.

    Args:
        translator: the model.
        name: of the input, in messages.
        output: how a translation is written.
        say: takes a message about a bad line.
        stops: whether a bad line is an error after all.
        languages: `src_lang` and `tgt_lang` of `Translator.translate`.
        **arguments: further arguments of it.

    Attributes:
        num_lines: lines so far.
        num_bad: those of them that could not be translated.
    """

    def __init__(
        self,
        translator: Translator,
        name: str,
        output: OutputFormat,
        *,
        say: Callable[[str], None],
        stops: bool = False,
        languages: tuple[str | None, str | None] = (None, None),
        **arguments: Any,
    ) -> None:
        self.translator, self.name, self.output, self.say, self.stops = translator, name, output, say, stops
        self.languages = languages
        self.arguments = arguments
        self.num_lines = self.num_bad = 0

    def __call__(self, raws: Sequence[bytes]) -> Iterator[str]:
        """The lines that stand for lines of the input, in order.

        Raises:
            DataError: a bad line, where these are errors; those before it have been given.
            UsageError: arguments that the model does not take.
        """
        first = self.num_lines + 1
        for line in self._translated([decoded_line(first + place, raw) for place, raw in enumerate(raws)]):
            self.num_lines += 1
            if isinstance(line, DataError):
                yield self._bad(line)
            else:
                yield line

    def _bad(self, error: DataError) -> str:
        self.num_bad += 1
        reason = f"{self.name} line {self.num_lines}: {error}"
        if self.stops:
            raise DataError(f"{reason}; stopped there")
        if self.num_bad <= _NAMED:
            self.say(f"{reason}; left empty")
        return self.output.of_bad(str(error))

    def summary(self) -> str | None:
        """How many lines were bad; None when all were good."""
        if not self.num_bad:
            return None
        return f"{self.num_bad:,} of {self.num_lines:,} lines could not be translated and were left empty"

    def _translated(self, lines: list[str | DataError]) -> list[str | DataError]:
        """Lines as they are written; what is bad with the others."""
        try:
            return self._all_translated(lines)
        except UsageError:
            reasons = [
                no_room(self.translator, line, *self.languages) if isinstance(line, str) else None for line in lines
            ]
            if not any(reasons):  # it is not a line that is wrong
                raise
        checked = [DataError(reason) if reason else line for line, reason in zip(lines, reasons, strict=True)]
        return self._all_translated(checked)

    def _all_translated(self, lines: Sequence[str | DataError]) -> list[str | DataError]:
        texts = [line for line in lines if isinstance(line, str)]
        src_lang, tgt_lang = self.languages
        found = self.translator.translate(texts, src_lang=src_lang, tgt_lang=tgt_lang, progress=False, **self.arguments)
        written = iter([self.output(text, one) for text, one in zip(texts, found, strict=True)])
        return [next(written) if isinstance(line, str) else line for line in lines]


def no_room(translator: Translator, line: str, src_lang: str | None = None, tgt_lang: str | None = None) -> str | None:
    """Why a model cannot take a line, even cut at its sentence ends; None when it can."""
    limit = translator.network.config.max_positions
    try:
        make_plan([line], translator.codes, src_lang, tgt_lang, limit=limit, may_split=True)
    except UsageError as error:
        return str(error).removeprefix("text 1 ")
    return None


def count_lines(path: Path) -> int:
    """Lines of a file, a last one without an end counted."""
    count, last = 0, b"\n"
    with path.open("rb") as file:
        while data := file.read(1 << 20):
            count += data.count(b"\n")
            last = data[-1:]
    return count + (last != b"\n")
