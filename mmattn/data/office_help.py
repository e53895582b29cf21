"""Real parallel text from Debian packages: LibreOffice's help in English, German, French and Spanish (MPL-2.0).

The packages are `libreoffice-help-en-us`, `-de`, `-fr` and `-es`. A paragraph has the same id in every language, so
that pairs are exact. Nothing of it is part of mmattn: the reader opens the installed or unpacked packages, and keeps
what it read in the cache folder of `datasets`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmattn.data.help_pages import aligned_sentences, read_paragraphs
from mmattn.data.pair_table import PairBuilder, PairTable
from mmattn.data.sentence_pairs import SentencePair
from mmattn.errors import DataError

LANGUAGES = ("en", "de", "es", "fr")
INSTALLED = Path("/usr/share/libreoffice/help")
_FOLDERS = {"en": "en-US"}
_PACKAGES = {"en": "libreoffice-help-en-us"}
_SHARES = {"test": 0.1, "validation": 0.05}
_READING = "1"  # raised when pages are read or cut differently, so that older caches are not used
_GRAM = 4
_FIELDS = ("file", "place", "source", "target")


def find_help(path: str | Path | None, language: str) -> Path:
    """The folder with one language's help pages.

    Args:
        path: Where packages were unpacked, one or several, together or each in a folder of its own; None for the
            installed packages.
        language: One of `LANGUAGES`.

    Raises:
        DataError: it is not there; the message says how to get it.
    """
    if language not in LANGUAGES:
        raise DataError(f"office-help has no language {language!r}: use one of {', '.join(LANGUAGES)}")
    name = _FOLDERS.get(language, language)
    root = None if path is None else Path(path)
    if root is None:
        candidates = [INSTALLED / name]
    else:
        inner = Path("usr/share/libreoffice/help") / name
        candidates = [root / inner, root / name, *sorted(root.glob(f"*/{inner}"))]
    for folder in candidates:
        if (folder / "text").is_dir():
            return folder
    package = _PACKAGES.get(language, f"libreoffice-help-{language}")
    where = f"the package {package} is not installed" if root is None else f"{root} holds no help in {language}"
    raise DataError(
        f"{where}: install it (apt-get install {package}), or unpack it (apt-get download {package}; "
        f"dpkg-deb -x {package}_*.deb help) and set data.path=help"
    )


def read_office_help(
    path: str | Path | None, src_lang: str, tgt_lang: str, cache: str | Path | None = None
) -> pa.Table:
    """Every pair of sentences, uncleaned: columns file, place, source, target.

    Args:
        path: See `find_help`.
        src_lang, tgt_lang: Two of `LANGUAGES`.
        cache: Where the table is kept for the next time; None for the cache folder of `datasets`.

    Raises:
        DataError: the help is not there, or has no pages in common.
    """
    if src_lang == tgt_lang:
        raise DataError(f"office-help needs two languages, not {src_lang} twice: set data.src_lang and data.tgt_lang")
    folders = find_help(path, src_lang), find_help(path, tgt_lang)
    pages = [_pages(folder) for folder in folders]
    names = sorted(pages[0] & pages[1])
    if not names:
        raise DataError(f"{folders[0]} and {folders[1]} have no pages in common: are they of one version?")
    kept = _cache_folder(cache) / f"{_fingerprint(folders, names)}.parquet"
    if kept.is_file():
        return pq.read_table(kept)
    rows = list(_sentence_rows(folders, names))
    table = pa.table({name: [row[place] for row in rows] for place, name in enumerate(_FIELDS)})
    kept.parent.mkdir(parents=True, exist_ok=True)
    partial = kept.with_suffix(f".{os.getpid()}")
    pq.write_table(table, partial)
    partial.replace(kept)
    return table


def open_office_help(path: str | Path | None, builder: PairBuilder, split: str, seed: int = 0) -> PairTable:
    """One split of the help, by page: pairs of a page are never in two.

    Of "validation" and "test", pairs are left out of which most word 4-grams of a side stand in training.

    Args:
        path: See `find_help`.
        builder: Checks the pairs; its languages are the help's.
        split: "train", "validation" or "test".
        seed: Of the split.

    Raises:
        DataError: see `read_office_help`.
    """
    assert builder.src_lang is not None
    assert builder.tgt_lang is not None
    table = read_office_help(path, builder.src_lang, builder.tgt_lang)
    # Duplicates are dropped before the split, or the same pair could stand on both sides of it.
    for batch in table.to_batches():
        for file, place, source, target in zip(*(batch[name].to_pylist() for name in _FIELDS), strict=True):
            builder.add(f"{file}#{place}", source, target)
    pairs = builder.finish()
    files = [place.partition("#")[0] for place in pairs.table["place"].to_pylist()]
    splits = {file: _split_of(file, seed) for file in dict.fromkeys(files)}
    which = np.array([splits[file] for file in files])
    kept = pairs.keep(np.flatnonzero(which == split))
    if split != "train" and len(kept):
        known = _grams(pairs.keep(np.flatnonzero(which == "train")))
        is_new = [not _is_known(pair, known) for pair in kept.pairs(range(len(kept)))]
        kept.dropped["known from training"] = len(is_new) - sum(is_new)
        kept = kept.keep(np.flatnonzero(is_new))
    if not len(kept):
        raise DataError(f"{kept.describe()}: nothing falls to split {split!r}; use another data.seed")
    return kept


def _pages(folder: Path) -> set[str]:
    return {page.relative_to(folder).as_posix() for page in (folder / "text").rglob("*.html")}


def _sentence_rows(folders: tuple[Path, Path], names: Sequence[str]) -> Iterator[tuple[str, str, str, str]]:
    for name in names:
        source, target = (_paragraphs(folder / name) for folder in folders)
        for key, text in source.items():
            if key in target:
                for number, pair in enumerate(aligned_sentences(text, target[key]), 1):
                    yield name, f"{key}/{number}", *pair


def _paragraphs(page: Path) -> dict[str, str]:
    try:
        return read_paragraphs(page.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{page}: not UTF-8 ({error.reason} at byte {error.start})") from error


def _cache_folder(cache: str | Path | None) -> Path:
    if cache is not None:
        return Path(cache)
    from datasets import config

    return Path(config.HF_DATASETS_CACHE) / "mmattn-office-help"


def _fingerprint(folders: tuple[Path, Path], names: Sequence[str]) -> str:
    """Changes with the pages (by size and time) and with how they are read."""
    digest = hashlib.blake2b(_READING.encode(), digest_size=16)
    for folder in folders:
        for name in names:
            state = (folder / name).stat()
            digest.update(f"{folder.name}/{name}/{state.st_size}/{state.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _split_of(file: str, seed: int) -> str:
    digest = hashlib.blake2b(f"{seed}/{file}".encode(), digest_size=8).digest()
    draw = int.from_bytes(digest, "little") / 2**64
    for split, share in _SHARES.items():
        if draw < share:
            return split
        draw -= share
    return "train"


def _word_grams(text: str) -> list[tuple[str, ...]]:
    words = text.casefold().split()
    size = min(_GRAM, len(words))
    return [tuple(words[start : start + size]) for start in range(len(words) - size + 1)]


def _grams(pairs: PairTable) -> tuple[set[tuple[str, ...]], set[tuple[str, ...]]]:
    """Of both sides."""
    found: tuple[set[tuple[str, ...]], set[tuple[str, ...]]] = (set(), set())
    for pair in pairs.pairs(range(len(pairs))):
        found[0].update(_word_grams(pair.source))
        found[1].update(_word_grams(pair.target))
    return found


def _is_known(pair: SentencePair, known: tuple[set[tuple[str, ...]], set[tuple[str, ...]]]) -> bool:
    for text, seen in zip((pair.source, pair.target), known, strict=True):
        grams = _word_grams(text)
        if 2 * sum(gram in seen for gram in grams) > len(grams):
            return True
    return False
