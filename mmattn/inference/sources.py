"""Source texts ready to be translated: cut into segments, sorted by length, batched by tokens, encoded once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from tqdm import tqdm

from mmattn.data.languages import LanguageCodes
from mmattn.errors import UsageError
from mmattn.inference.origins import Origin
from mmattn.inference.segments import Document, Segment, split_line
from mmattn.inference.texts import check_unicode
from mmattn.models.translator import LayerContexts, TranslatorNetwork


@dataclass(frozen=True)
class Plan:
    """What is to be translated.

    Attributes:
        documents: one for each text of the caller.
        segments: every input of the model.
        is_single: the caller gave one text, not a list.
    """

    documents: list[Document]
    segments: list[Segment]
    is_single: bool


@dataclass(frozen=True, eq=False)
class EncodedBatch:
    """Segments that went through the encoder together.

    Attributes:
        numbers: which segments, in the order of the rows.
        contexts: the decoder's cross-attention keys and values, a row per segment.
    """

    numbers: list[int]
    contexts: LayerContexts

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values and masks."""
        return sum(context.nbytes for context in self.contexts if context is not None)


@dataclass(frozen=True, eq=False)
class EncodedSources:
    """What `Translator.encode` returns: any number of translations start from it without the encoder.

    Attributes:
        plan: the texts.
        batches: their keys and values.
        origin: stands for the network that encoded them; None: not known.
    """

    plan: Plan
    batches: list[EncodedBatch] = field(default_factory=list)
    origin: Origin | None = None

    def __len__(self) -> int:
        return len(self.plan.documents)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(batch.nbytes for batch in self.batches)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> EncodedSources:
        """The same texts on another device or in another dtype: those of the model that shall take them."""
        batches = [
            EncodedBatch(
                batch.numbers,
                tuple(None if context is None else context.to(device, dtype) for context in batch.contexts),
            )
            for batch in self.batches
        ]
        return EncodedSources(self.plan, batches, self.origin)

    def segment(self, number: int) -> EncodedBatch:
        """A batch of one segment."""
        batch = next(batch for batch in self.batches if number in batch.numbers)
        rows = torch.tensor([batch.numbers.index(number)])
        contexts = tuple(None if each is None else each.select(rows) for each in batch.contexts)
        return EncodedBatch([number], contexts)


def make_plan(
    texts: str | Sequence[str],
    languages: LanguageCodes,
    src_lang: str | Sequence[str] | None,
    tgt_lang: str | Sequence[str] | None,
    *,
    limit: int,
    may_split: bool,
) -> Plan:
    """Cut texts into lines and lines into segments of at most `limit` tokens.

    Raises:
        UsageError: something other than texts, languages that do not fit, or a line that is too long.
    """
    is_single = isinstance(texts, str)
    if not is_single and (isinstance(texts, bytes | Mapping) or not isinstance(texts, Iterable)):
        raise UsageError(f"texts is a {type(texts).__name__}: give a str or a list of them")
    given = [texts] if isinstance(texts, str) else list(texts)
    wrong = next((number for number, text in enumerate(given) if not isinstance(text, str)), None)
    if wrong is not None:
        raise UsageError(f"text {wrong + 1} of {len(given)} is a {type(given[wrong]).__name__}, not a str")
    for number, text in enumerate(given, 1):
        check_unicode(text, f"text {number} of {len(given)}")
    sources, targets = each_text(src_lang, len(given), "src_lang"), each_text(tgt_lang, len(given), "tgt_lang")
    for code in dict.fromkeys(targets):
        if code is not None:
            languages.check(code, "tgt_lang")
    pieces: list[tuple[str, str | None, str | None]] = []
    documents = []
    for number, (text, source, target) in enumerate(zip(given, sources, targets, strict=True)):
        lines = []
        for line_number, line in enumerate(text.split("\n")):
            parts: list[str] = []
            if line.strip():
                place = f"text {number + 1}" + (f", line {line_number + 1}" if "\n" in text else "")
                count = _counter(languages, source, target)
                parts = split_line(line.strip(), count, limit, may_split=may_split, place=place)
            lines.append([len(pieces) + place for place in range(len(parts))])
            pieces += [(part, source, target) for part in parts]
        documents.append(Document(lines))
    return Plan(documents, _segments(pieces, languages), is_single)


def each_text(lang: str | Sequence[str] | None, num_texts: int, argument: str) -> list[str | None]:
    """A language for each text.

    Raises:
        UsageError: another number of languages, or no languages at all.
    """
    if lang is None or isinstance(lang, str):
        return [lang] * num_texts
    if not isinstance(lang, Sequence):
        raise UsageError(f"{argument} is a {type(lang).__name__}: give one code, or one for each text")
    if len(lang) != num_texts:
        raise UsageError(f"{len(lang)} {argument} for {num_texts} texts: give one, or one for each text")
    return list(lang)


def _counter(languages: LanguageCodes, source: str | None, target: str | None) -> Callable[[str], int]:
    def count(text: str) -> int:
        return len(languages.source_ids([text], source, target)[0])

    return count


def _segments(pieces: list[tuple[str, str | None, str | None]], languages: LanguageCodes) -> list[Segment]:
    by_languages: dict[tuple[str | None, str | None], list[int]] = {}
    for number, (_, source, target) in enumerate(pieces):
        by_languages.setdefault((source, target), []).append(number)
    ids: dict[int, list[int]] = {}
    for (source, target), numbers in by_languages.items():
        rows = languages.source_ids([pieces[number][0] for number in numbers], source, target)
        ids.update(zip(numbers, rows, strict=True))
    return [Segment(text, ids[number], *codes) for number, (text, *codes) in enumerate(pieces)]


def token_batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Numbers of rows in batches of similar length, longest first, of at most `batch_tokens` padded tokens each.

    A row that is longer by itself makes a batch of its own.
    """
    batch: list[int] = []
    longest = 0
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        longest = max(longest, lengths[number])
        if batch and longest * (len(batch) + 1) > batch_tokens:
            yield batch
            batch, longest = [], lengths[number]
        batch.append(number)
    if batch:
        yield batch


def padded(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Ids `[B, L]` and the mask bool `[B, L]`, None where nothing is padded."""
    length = max(map(len, rows))
    ids = torch.tensor([[*row, *[pad] * (length - len(row))] for row in rows], device=device)
    if min(map(len, rows)) == length:
        return ids, None
    lengths = torch.tensor([len(row) for row in rows], device=device)
    return ids, torch.arange(length, device=device) < lengths[:, None]


def encode_batch(network: TranslatorNetwork, segments: Sequence[Segment], numbers: list[int]) -> EncodedBatch:
    """Run the encoder over some segments and project what the decoder attends to."""
    device = next(network.parameters()).device
    ids, mask = padded([segments[number].ids for number in numbers], network.config.pad_token_id, device)
    return EncodedBatch(numbers, network.project_context(network.encode(ids, mask), mask))


def with_bar(
    batches: Iterable[EncodedBatch], plan: Plan, progress: bool | None, label: str, num_batches: int
) -> Iterator[EncodedBatch]:
    """The batches, with a bar that moves as each is done with."""
    # tqdm leaves a bar out by itself, with None, where there is no terminal.
    hidden = (None if num_batches > 1 else True) if progress is None else not progress
    with tqdm(total=len(plan.segments), desc=label, unit="line", disable=hidden) as bar:
        for batch in batches:
            yield batch
            bar.update(len(batch.numbers))
