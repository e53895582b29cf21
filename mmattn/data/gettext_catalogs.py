"""Parallel text from gettext catalogues (.po and .mo): messages of programs and their translations.

Taken are finished entries only: not fuzzy, obsolete or empty ones. Placeholders and markup stay as they are; keyboard
accelerators go.
"""

from __future__ import annotations

import gettext
import glob
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmattn._optional import require
from mmattn.data.pair_table import PairBuilder, PairTable
from mmattn.errors import DataError

_SUFFIXES = (".po", ".mo")
_BRACKETED = re.compile(r"\s?\([_&]\w\)")  # (_F) after a word, where the language has no letter to mark
_ENTITY = re.compile(r"&#?\w+;")
# One mark before a letter or digit, not doubled.
_MARK = re.compile(r"(?<![_&])([_&])(?=[^\W_])")
_PLURAL_FORMS = re.compile(r"plural\s*=\s*([^;]+)")


def find_catalogs(path: str | Path, language: str | None) -> list[Path]:
    """The catalogues of a language.

    Args:
        path: A catalogue, a glob of them, or a folder that is searched, such as /usr/share/locale or a project's po.
        language: As gettext writes it ("de", "pt_BR"); needed for a folder, in which catalogues are told by a folder
            of that name above them, or by their own name (`de.po`, `app-de.po`).

    Raises:
        DataError: there are none.
    """
    folder = Path(path)
    if not folder.is_dir():
        found = [Path(file) for file in sorted(glob.glob(str(path)))] if glob.has_magic(str(path)) else [folder]
        for file in found:
            if file.suffix.lower() not in _SUFFIXES:
                raise DataError(f"{file} is no gettext catalogue: give .po or .mo files, or a folder with them")
        if not found or not found[0].is_file():
            raise DataError(f"{path}: no such file; set data.path to a .po or .mo file, or a folder with them")
        return found
    if language is None:
        raise DataError(
            f"{path} is a folder: set data.tgt_lang to the language whose catalogues are wanted, such as de"
        )
    files = sorted(file for suffix in _SUFFIXES for file in folder.rglob(f"*{suffix}"))
    wanted = [file for file in files if _is_in(file.relative_to(folder), language)]
    if not wanted:
        raise DataError(f"{path} holds no .po or .mo catalogues in {language}, of {len(files)} that it holds")
    return wanted


def _is_in(file: Path, language: str) -> bool:
    return language in file.parts[:-1] or re.search(rf"(^|[-._]){re.escape(language)}$", file.stem) is not None


def read_catalogs(path: str | Path, builder: PairBuilder) -> PairTable:
    """Every pair of finished messages.

    Args:
        path: See `find_catalogs`.
        builder: Checks the pairs; its target language picks the catalogues of a folder. A catalogue that cannot be
            read counts as one bad pair.

    Raises:
        DataError: no catalogues, too many that cannot be read, or no finished message.
        OptionalPackageError: polib is not installed.
    """
    polib = require("polib", "reading gettext catalogues")
    for file in find_catalogs(path, builder.tgt_lang):
        try:
            catalog = (polib.mofile if file.suffix.lower() == ".mo" else polib.pofile)(str(file))
        except (OSError, ValueError, LookupError) as error:  # polib raises OSError for what it cannot parse
            builder.add_bad(str(file), f"cannot be read ({' '.join(str(error).split())})")
            continue
        language = builder.tgt_lang or catalog.metadata.get("Language") or None
        for number, entry in enumerate(catalog, 1):
            line = getattr(entry, "linenum", None)  # compiled catalogues have no lines
            place = f"{file} entry {number}" if line is None else f"{file} line {line}"
            for source, target in _messages(entry, catalog.metadata):
                for one, other in _paragraph_pairs(source, target):
                    builder.add(place, *without_accelerators(one, other), tgt_lang=language)
    return builder.finish()


def _messages(entry: Any, metadata: dict[str, str]) -> Iterator[tuple[str, str]]:
    """The message and its translation; of one with plural forms, singular and plural."""
    is_unfinished = entry.obsolete or getattr(entry, "fuzzy", False)  # msgfmt compiles no fuzzy entries
    if is_unfinished or not entry.msgid:
        return
    forms = {int(number): text for number, text in entry.msgstr_plural.items()}
    if not entry.msgid_plural:
        pairs = [(entry.msgid, entry.msgstr)]
    elif len(forms) == 1:
        pairs = [(entry.msgid_plural, forms.get(0, ""))]
    else:
        one, many = _plural_numbers(metadata)
        pairs = [(entry.msgid, forms.get(one, "")), (entry.msgid_plural, forms.get(many, ""))]
    yield from ((source, target) for source, target in pairs if source.strip() and target.strip())


def _plural_numbers(metadata: dict[str, str]) -> tuple[int, int]:
    """Which form stands for one, and which for a hundred, the plural that most languages use most."""
    match = _PLURAL_FORMS.search(metadata.get("Plural-Forms", ""))
    if match is None:
        return 0, 1
    try:
        form = gettext.c2py(match[1].strip())  # pyright: ignore[reportAttributeAccessIssue]
        return int(form(1)), int(form(100))
    except (ValueError, ZeroDivisionError):
        return 0, 1


def _paragraph_pairs(source: str, target: str) -> Iterator[tuple[str, str]]:
    """Paragraphs one by one where both sides have as many, else the whole; line breaks within them are wrapping."""
    sources, targets = (re.split(r"\n\s*\n", text.strip()) for text in (source, target))
    if len(sources) != len(targets):
        sources, targets = [source], [target]
    for one, other in zip(sources, targets, strict=True):
        yield " ".join(one.split()), " ".join(other.split())


def without_accelerators(source: str, target: str) -> tuple[str, str]:
    """Both texts without the `_` or `&` that marks a keyboard accelerator: "_File" and "&File" become "File".

    At most one mark is taken from a text. A mark inside a word counts only when the other text has not the same word:
    `file_name` and `AT&T` stay.
    """
    return _without_accelerator(source, target), _without_accelerator(target, source)


def _without_accelerator(text: str, other: str) -> str:
    bracketed = _BRACKETED.search(text)
    if bracketed is not None:
        return text[: bracketed.start()] + text[bracketed.end() :]
    entities = [range(*match.span()) for match in _ENTITY.finditer(text)]
    marks = [match.start() for match in _MARK.finditer(text) if not any(match.start() in one for one in entities)]
    if len(marks) != 1:
        return text
    place = marks[0]
    start = max(text.rfind(" ", 0, place), text.rfind("\t", 0, place)) + 1
    word = text[start:].split(maxsplit=1)[0]
    if place > start and text[place - 1].isalnum() and word in other.split():
        return text
    if _is_placeholder(word):
        return text
    return text[:place] + text[place + 1 :]


def _is_placeholder(word: str) -> bool:
    """%(file_name)s, {file_name}, ${FILE_NAME}, $file_name, http://x/a_b?c&d, --some_option, <a_b>."""
    return re.search(r"[%{}$<>=/@]|^-", word) is not None
