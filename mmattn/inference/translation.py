"""The target side of the translator: decoding on encoded sources, tokens to texts, segments to documents."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch

from mmattn.data.languages import LanguageCodes
from mmattn.errors import UsageError
from mmattn.inference.alignments import Alignment, align_words, join_alignments
from mmattn.inference.decode import DecodeSettings, Generated, decode, stream
from mmattn.inference.hub import evaluating
from mmattn.inference.segments import Segment
from mmattn.inference.sources import EncodedBatch, EncodedSources, Plan, encode_batch
from mmattn.inference.translation_maps import TranslationRecorder
from mmattn.models.static_decoding import StaticState
from mmattn.models.translator import CompiledDecoder, TranslationState, TranslatorNetwork


class Translated(NamedTuple):
    """A translation, with what was asked for beside it.

    Attributes:
        text: the translation.
        score: log-probability, with beams divided by `length ** length_penalty`; None unless asked for.
        alignment: which source words each word was made from; None unless asked for.
    """

    text: str
    score: float | None = None
    alignment: Alignment | None = None


@dataclass(frozen=True)
class MemoryUse:
    """Bytes that decoding takes beside the weights.

    Attributes:
        context: keys and values of the sources, once per source however many beams there are.
        cache: keys and values of the tokens decoded so far, for every beam.
    """

    context: int
    cache: int

    @property
    def total(self) -> int:
        """Both."""
        return self.context + self.cache


@dataclass(frozen=True)
class Piece:
    """One translation of a segment."""

    text: str
    score: float | None
    alignment: Alignment | None


class TargetSide:
    """Decodes batches of encoded segments.

    Args:
        network: the network.
        codes: its tokenizer and languages.
        settings: how to decode.
        start_id: the token that every translation starts from.
        window: of the self-attention cache.
        with_alignment, with_scores: what a `Piece` shall hold.
        compiled: takes the steps, where they are compiled.

    Attributes:
        recorder: reads the best translation of every segment once more for the attention maps; None: no one wants them.
        memory: what the last batch took: the sources' keys and values, with their copy where steps are compiled, and
            the caches as large as they grew.
    """

    def __init__(
        self,
        network: TranslatorNetwork,
        codes: LanguageCodes,
        settings: DecodeSettings,
        start_id: int,
        window: int | None = None,
        with_alignment: bool = False,
        with_scores: bool = False,
        compiled: CompiledDecoder | None = None,
    ) -> None:
        self.compiled = compiled
        self.network, self.tokenizer, self.settings, self.window = network, codes.tokenizer, settings, window
        self.start_id, self.with_alignment, self.with_scores = start_id, with_alignment, with_scores
        self.memory = MemoryUse(0, 0)
        self.recorder: TranslationRecorder | None = None
        self._special = frozenset(self.tokenizer.all_special_tokens) | codes.tokens

    def decode(
        self,
        segments: Sequence[Segment],
        batch: EncodedBatch,
        targets: Sequence[int | None],
        generator: torch.Generator | None,
    ) -> list[list[Piece]]:
        """For each segment of the batch its `num_return_sequences` translations, best first."""
        prompt, num_forced, settings = self._prompt([targets[number] for number in batch.numbers])
        state = self._start(batch, reads_alignment=self.with_alignment)
        generated = decode(
            state,
            prompt,
            settings,
            num_forced=num_forced,
            generator=generator,
            with_scores=self.with_scores,
            keep_rows=self.with_alignment,
            stop_every=1 if settings.do_sample else state.stop_every,
        )
        if self.recorder is not None:
            for row, (number, candidates) in enumerate(zip(batch.numbers, generated, strict=True)):
                pieces = [self._source_pieces(segments[number].ids), self._pieces(candidates[0].tokens)]
                self.recorder.add(segments[number], number, row, batch, candidates[0], pieces)
        copied = state.context_bytes if isinstance(state, StaticState) else 0
        self.memory = MemoryUse(batch.nbytes + copied, state.peak_cache_bytes)
        return [
            [self._piece(segments[number], one, state) for one in candidates]
            for number, candidates in zip(batch.numbers, generated, strict=True)
        ]

    def check_streaming(self) -> None:
        """Raise when the settings cannot be streamed."""
        if self.settings.num_beams > 1 or self.settings.num_return_sequences > 1:
            raise UsageError("stream=True decodes one token after another: use num_beams=1 and num_return_sequences=1")

    def stream(self, batch: EncodedBatch, target: int | None, generator: torch.Generator | None) -> Iterator[str]:
        """The translation of one segment in pieces, each as soon as later tokens cannot change it."""
        prompt, num_forced, settings = self._prompt([target])
        tokens: list[int] = []
        done = ""
        steps = stream(self._start(batch), prompt, settings, num_forced=num_forced, generator=generator)
        while True:
            with evaluating(self.network):
                token = next(steps, None)
            if token is None:
                break
            tokens.append(token)
            text = self._text(tokens)
            # A word is certain once the next one has begun; the space between may still go, before a full stop say.
            certain = text.rfind(" ")
            if certain > len(done) and text.startswith(done):
                yield text[len(done) : certain]
                done = text[:certain]
        text = self._text(tokens)
        if text[len(done) :]:
            yield text[len(done) :]

    def _start(self, batch: EncodedBatch, *, reads_alignment: bool = False) -> TranslationState | StaticState:
        start = 1
        total, settings = self.settings.total_length(start), self.settings
        if self.compiled is None:
            return self.network.start(
                batch.contexts, max_length=total, window=self.window, reads_alignment=reads_alignment
            )
        return self.compiled.start(
            batch.contexts,
            most_rows=max(settings.num_beams, settings.num_return_sequences),
            max_length=total,
            window=self.window,
            reads_alignment=reads_alignment,
        )

    def _prompt(self, targets: Sequence[int | None]) -> tuple[torch.Tensor, int, DecodeSettings]:
        """Prompts `[B, L]`, how many of their tokens are forced, and settings that do not force them again."""
        start = self.start_id
        device = next(self.network.parameters()).device
        settings = replace(self.settings, forced_bos_token_id=None)
        # As in transformers, an end that is forced comes before a language where there is room for one of them.
        is_end = settings.forced_eos_token_id is not None and settings.total_length(1) == 2
        if is_end or any(target is None for target in targets):
            return torch.full((len(targets), 1), start, device=device), 0, settings
        prompt = torch.tensor([[start, target] for target in targets], device=device)
        return prompt, 1, settings

    def _text(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True)).strip()

    def _piece(self, segment: Segment, one: Generated, state: TranslationState | StaticState) -> Piece:
        alignment = self._alignment(segment, one, state) if self.with_alignment else None
        return Piece(self._text(one.tokens), one.score if self.with_scores else None, alignment)

    def _alignment(self, segment: Segment, one: Generated, state: TranslationState | StaticState) -> Alignment:
        assert one.rows is not None
        first = sum(row < 0 for row in one.rows)
        length = len(segment.ids)
        weights = np.zeros((len(one.tokens), length), dtype=np.float32)
        for place, row in enumerate(one.rows[first:]):
            weights[first + place] = state.steps[place][row, :length].float().cpu().numpy()
        target, source = self._pieces(one.tokens), self._source_pieces(segment.ids)
        return align_words(source, target, weights, self._special, unknown=self.tokenizer.unk_token)

    def _pieces(self, tokens: Sequence[int]) -> list[str]:
        # Weights often have a few more entries than the vocabulary: tokens without a spelling.
        return [piece or "" for piece in self.tokenizer.convert_ids_to_tokens(list(tokens))]

    def _source_pieces(self, ids: Sequence[int]) -> list[str]:
        if not getattr(self.tokenizer, "separate_vocabs", False):
            return self.tokenizer.convert_ids_to_tokens(ids)
        # Such a Marian tokenizer turns ids into tokens by the target's vocabulary.
        pieces = {number: piece for piece, number in self.tokenizer.get_vocab().items()}
        return [pieces[number] for number in ids]


def stream_document(
    side: TargetSide,
    plan: Plan,
    ready: EncodedSources | None,
    targets: Sequence[int | None],
    generator: torch.Generator | None,
) -> Iterator[str]:
    """The translation of a plan's only text in pieces, its segments encoded one by one unless they are `ready`."""
    for place, line in enumerate(plan.documents[0].lines):
        if place:
            yield "\n"
        for first, number in enumerate(line):
            if first:
                yield " "
            if ready is None:
                with evaluating(side.network):
                    batch = encode_batch(side.network, plan.segments, [number])
            else:
                batch = ready.segment(number)
            yield from side.stream(batch, targets[number], generator)


def assemble(
    plan: Plan, pieces: dict[int, list[Piece]], count: int, *, with_scores: bool, with_alignment: bool
) -> list[Any]:
    """Segments to documents: plain texts, or `Translated` with what is asked for; lists for a count above 1."""
    results: list[Any] = []
    for document in plan.documents:
        candidates: list[Any] = []
        for rank in range(count):
            parts = {number: pieces[number][rank] for number in document.segments}
            text = "\n".join(" ".join(parts[number].text for number in line) for line in document.lines)
            if not (with_scores or with_alignment):
                candidates.append(text)
                continue
            score = sum(part.score for part in parts.values() if part.score is not None) if with_scores else None
            alignments = [part.alignment for part in parts.values() if part.alignment is not None]
            candidates.append(Translated(text, score, join_alignments(alignments) if with_alignment else None))
        results.append(candidates if count > 1 else candidates[0])
    return results
