"""Paragraphs of LibreOffice's HTML help, and sentences that stand for each other in two languages."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html.parser import HTMLParser

_TEXT_TAGS = frozenset({"p", "h1", "h2", "h3", "h4", "h5", "h6"})
_VOID_TAGS = frozenset({"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "wbr"})
_SPACES = re.compile(r"\s+")
# A mark that ends a sentence, closing quotes or brackets, then a space before what may start one.
_END = re.compile(r"(?<=[.!?])([\"”“»)\]]?) (?=[\"„“«(\[]?[A-ZÄÖÜÉÈÀÊÇÎÑÁÍÓÚ¿¡])")
# After these a full stop ends no sentence: abbreviations, single letters, numbers of a list or a date.
_ABBREVIATIONS = (
    r"e\.g|i\.e|etc|vs|no|nr|fig|max|min|mr|dr|st|bzw|usw|ca|evtl|ggf|inkl|z\. ?b|d\. ?h|u\. ?a|s\. ?o|ej|p\. ?ex"
)
_NO_END = re.compile(rf"\b(?:[a-z]|\d+|{_ABBREVIATIONS})\.$", re.IGNORECASE)


def read_paragraphs(html: str) -> dict[str, str]:
    """The text of every paragraph and heading that has an id, by id; code is left out.

    Where the help says one thing on a Mac and another elsewhere, what it says elsewhere is taken; what it shows in one
    application only is left out.
    """
    parser = _HelpParser()
    parser.feed(html)
    parser.close()
    return {key: text for key, parts in parser.found.items() if (text := _SPACES.sub(" ", "".join(parts)).strip())}


class _HelpParser(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.found: dict[str, list[str]] = {}
        self._parts: list[str] | None = None  # of the paragraph that is open
        self._open: list[tuple[str, bool]] = []  # tags within it, and whether each hides its text
        self._hiding = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        if tag in _TEXT_TAGS:
            self._close()
            name, kind = attributes.get("id") or "", attributes.get("class") or ""
            if name and "code" not in kind and name not in self.found:
                self._parts = self.found[name] = []
        elif self._parts is not None:
            if tag in _VOID_TAGS:
                self._parts.append(" " if tag == "br" else "")
                return
            hides = "hidden" in attributes and not (attributes.get("id") or "").startswith("default")
            self._open.append((tag, hides))
            self._hiding += hides

    def handle_endtag(self, tag: str) -> None:
        if tag in _TEXT_TAGS:
            self._close()
        elif any(name == tag for name, _ in self._open):
            while True:
                name, hides = self._open.pop()
                self._hiding -= hides
                if name == tag:
                    break

    def handle_data(self, data: str) -> None:
        if self._parts is not None and not self._hiding:
            self._parts.append(data)

    def _close(self) -> None:
        self._parts, self._open, self._hiding = None, [], 0


def aligned_sentences(source: str, target: str) -> Iterator[tuple[str, str]]:
    """The sentences of a paragraph and its translation, one by one where the cuts agree, else as a whole.

    Cuts agree when there are equally many, and every sentence ends in the same mark as its translation.
    """
    sources, targets = cut_sentences(source), cut_sentences(target)
    if len(sources) == len(targets) and all(
        _last_mark(one) == _last_mark(other) for one, other in zip(sources, targets, strict=True)
    ):
        yield from zip(sources, targets, strict=True)
    else:
        yield source, target


def cut_sentences(text: str) -> list[str]:
    """Cuts at a full stop, question or exclamation mark before what may start a sentence."""
    sentences, start = [], 0
    for match in _END.finditer(text):
        before = text[start : match.end(1)]
        if not _NO_END.search(before):
            sentences.append(before)
            start = match.end()
    return [*sentences, text[start:]]


def _last_mark(sentence: str) -> str:
    stripped = sentence.rstrip('"”“»)] ')
    return stripped[-1] if stripped and stripped[-1] in ".!?:" else ""
