"""Sentence pairs to token ids, many at once: what a translator reads, is scored on, and how long both are."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from mmattn.data.languages import LanguageCodes
from mmattn.data.sentence_pairs import ParallelSource, SelectedPairs, SentencePair, read_pairs
from mmattn.errors import DataError, UsageError

_CHUNK = 4096
_KNOWN_WORDS = 200_000


@dataclass(frozen=True)
class TokenizedPair:
    """A pair in tokens.

    Args:
        source: What the encoder reads, language token and end token included.
        text: Which of the source's tokens are the text's own.
        prefix: Forced first target tokens: the target language's, or none.
        target: The translation's tokens and the end token.
    """

    source: list[int]
    text: range
    prefix: list[int]
    target: list[int]

    @property
    def lengths(self) -> tuple[int, int]:
        """Tokens of the source, and places of the decoder."""
        return len(self.source), len(self.prefix) + len(self.target)


class PairTokenizer:
    """Pairs to token ids with a Marian, NLLB or M2M100 tokenizer.

    A Marian tokenizer that knows several target languages gets the pair's as `>>de<<` before the source, unless the
    text itself starts so. NLLB and M2M100 get both languages.

    Args:
        tokenizer: The translator's.
        language_codes: What the tokenizer calls a language, where the pairs call it otherwise: {"de": "deu_Latn"}.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, language_codes: Mapping[str, str] | None = None) -> None:
        self.tokenizer: Any = tokenizer
        self.languages = LanguageCodes(tokenizer)
        self.codes = dict(language_codes or {})
        if tokenizer.eos_token_id is None:
            raise UsageError("the tokenizer has no end token: this is no translator's")
        self._counts: tuple[dict[str, int], dict[str, int]] = ({}, {})

    def __call__(self, pairs: Sequence[SentencePair]) -> list[TokenizedPair]:
        """Tokenizes pairs.

        Raises:
            DataError: a pair whose language the tokenizer needs and does not get, or does not know.
        """
        named = [self.with_codes(pair) for pair in pairs]
        sources = _by_group(named, lambda pair: (pair.src_lang, pair.tgt_lang), self._source_ids)
        targets = self._target_ids(named)
        return [
            TokenizedPair(source, self._text_tokens(pair, source), self._prefix(pair), target)
            for pair, source, target in zip(named, sources, targets, strict=True)
        ]

    def word_places(self, text: str, num_tokens: int, *, is_target: bool) -> list[range]:
        """Which of a text's tokens make up each of its words (split at white space).

        Args:
            text: The text.
            num_tokens: How many tokens it has, language and end tokens not counted.
            is_target: Of which side.

        Raises:
            DataError: the tokenizer does not keep words apart.
        """
        words = text.split()
        counts = self._counts[is_target]
        new = list(dict.fromkeys(word for word in words if word not in counts))
        if new:
            if len(counts) > _KNOWN_WORDS:
                counts.clear()
                new = list(dict.fromkeys(words))
            counts.update(zip(new, map(len, self._plain_ids(new, is_target=is_target)), strict=True))
        places, start = [], 0
        for word in words:
            places.append(range(start, start + counts[word]))
            start += counts[word]
        if start != num_tokens:
            raise DataError(
                f"{text!r} has {num_tokens} tokens, its words one by one have {start}: this tokenizer does not keep "
                "words apart, so word alignments cannot be used with it"
            )
        return places

    def with_codes(self, pair: SentencePair) -> SentencePair:
        """The pair, with the languages that its tokenizer asks for under their names there, and no others.

        Raises:
            DataError: one that the tokenizer needs and the pair does not name, or that the tokenizer does not know.
        """
        kind = self.languages.kind
        has_tag = kind == "tag" and self.languages.has_tag(pair.source)
        src_lang = self._code(pair, "src_lang") if kind == "token" else None
        tgt_lang = self._code(pair, "tgt_lang") if kind != "none" and not has_tag else None
        return dataclasses.replace(pair, src_lang=src_lang, tgt_lang=tgt_lang)

    def _code(self, pair: SentencePair, argument: str) -> str:
        language: str | None = getattr(pair, argument)
        if language is None:
            known = ", ".join(self.languages.known[:3])
            raise DataError(
                f"{pair.id} has no {argument}, which this tokenizer needs: give one of its codes ({known}, ...)"
            )
        try:
            return self.languages.check(self.codes.get(language, language), argument)
        except UsageError as error:
            raise DataError(f"{pair.id}: {error}; name it in language_codes") from error

    def _source_ids(self, pairs: Sequence[SentencePair]) -> list[list[int]]:
        texts = [pair.source for pair in pairs]
        src_lang, tgt_lang = pairs[0].src_lang, pairs[0].tgt_lang
        ids = _sentencepiece_ids(self.tokenizer, texts, is_target=False)
        if ids is None:
            return self.languages.source_ids(texts, src_lang, tgt_lang)
        tag = [] if tgt_lang is None else [self.tokenizer.convert_tokens_to_ids(f">>{tgt_lang}<<")]
        return [[*tag, *row, self._eos] for row in ids]

    def _target_ids(self, pairs: Sequence[SentencePair]) -> list[list[int]]:
        ids = self._plain_ids([pair.target for pair in pairs], is_target=True)
        return [[*row, self._eos] for row in ids]

    def _text_tokens(self, pair: SentencePair, source: Sequence[int]) -> range:
        if self.languages.kind == "token":
            assert pair.src_lang is not None
            is_first = source[0] == self.languages.target_token(pair.src_lang)
            return range(1, len(source) - 1) if is_first else range(len(source) - 2)  # NLLB's older layout
        return range(int(pair.tgt_lang is not None), len(source) - 1)

    def _prefix(self, pair: SentencePair) -> list[int]:
        if self.languages.kind != "token":
            return []
        assert pair.tgt_lang is not None
        return [self.languages.target_token(pair.tgt_lang)]

    @property
    def _eos(self) -> int:
        return int(self.tokenizer.eos_token_id)

    def _plain_ids(self, texts: Sequence[str], *, is_target: bool) -> list[list[int]]:
        """Without any special token."""
        ids = _sentencepiece_ids(self.tokenizer, texts, is_target=is_target)
        if ids is not None:
            return ids
        # M2M100 and NLLB have one vocabulary, and their target mode asks for a language.
        argument = "text_target" if is_target and self.languages.kind != "token" else "text"
        return list(self.tokenizer(**{argument: list(texts)}, add_special_tokens=False).input_ids)


def _by_group(
    pairs: Sequence[SentencePair],
    key: Callable[[SentencePair], Hashable],
    encode: Callable[[Sequence[SentencePair]], list[list[int]]],
) -> list[list[int]]:
    """Encodes the pairs that share a key together, and gives the rows in the order of the pairs."""
    groups: dict[Hashable, list[int]] = {}
    for place, pair in enumerate(pairs):
        groups.setdefault(key(pair), []).append(place)
    rows: list[list[int]] = [[]] * len(pairs)
    for places in groups.values():
        for place, row in zip(places, encode([pairs[place] for place in places]), strict=True):
            rows[place] = row
    return rows


def _sentencepiece_ids(tokenizer: Any, texts: Sequence[str], *, is_target: bool) -> list[list[int]] | None:
    """What a Marian tokenizer makes of texts, without special tokens, from its sentencepiece model: ten times faster.

    None for another tokenizer, and for texts in which it finds special tokens.
    """
    spm = getattr(tokenizer, "spm_target" if is_target else "spm_source", None)
    if spm is None or getattr(tokenizer, "encoder", None) is None:
        return None
    special = set(tokenizer.all_special_tokens) | set(tokenizer.get_added_vocab())
    if any(token in text for text in texts for token in special) or any(text.startswith(">>") for text in texts):
        return None
    encoder = tokenizer.target_encoder if is_target and tokenizer.separate_vocabs else tokenizer.encoder
    unknown = encoder[str(tokenizer.unk_token)]
    return [[encoder.get(piece, unknown) for piece in pieces] for pieces in spm.encode(list(texts), out_type=str)]


@dataclass(frozen=True, eq=False)
class PairLengths:
    """What one pass over a source says of its pairs.

    Args:
        lengths: int32 [N, 2]: tokens of the source, and places of the decoder, as the collator makes them.
        num_aligned: Pairs with a word alignment.
    """

    lengths: np.ndarray
    num_aligned: int


def token_lengths(source: ParallelSource, tokenizer: PairTokenizer) -> PairLengths:
    """Measures every pair of a source, for batches of like lengths.

    Raises:
        DataError: pairs with several target languages and a tokenizer of one; see `PairTokenizer` for others.
    """
    lengths = np.empty((len(source), 2), dtype=np.int32)
    num_aligned, targets = 0, set()
    for start in range(0, len(source), _CHUNK):
        pairs = read_pairs(source, range(start, min(start + _CHUNK, len(source))))
        targets.update(pair.tgt_lang for pair in pairs)
        if len(targets) > 1 and tokenizer.languages.kind == "none":
            named = ", ".join(sorted(map(str, targets)))
            raise DataError(
                f"{source.name} has several target languages ({named}), and the tokenizer has no language tokens: "
                "train one with languages, or start from a multilingual checkpoint"
            )
        num_aligned += sum(pair.alignment is not None for pair in pairs)
        lengths[start : start + len(pairs)] = [pair.lengths for pair in tokenizer(pairs)]
    return PairLengths(lengths, num_aligned)


def drop_too_long(
    source: ParallelSource,
    measured: PairLengths,
    *,
    max_source_length: int,
    max_target_length: int,
    refuse: bool = False,
) -> tuple[ParallelSource, np.ndarray, int]:
    """Leaves out pairs that a model has no room for.

    Args:
        source: The pairs.
        measured: Their lengths, from `token_lengths`.
        max_source_length, max_target_length: Tokens at most, special tokens included.
        refuse: Raise instead of leaving out.

    Returns:
        The source without them, its lengths int32 [M, 2], and how many pairs are left out.

    Raises:
        DataError: there are some and `refuse` is set, or nothing is left.
    """
    is_long = (measured.lengths > (max_source_length, max_target_length)).any(axis=1)
    number = int(is_long.sum())
    if not number:
        return source, measured.lengths, 0
    first = int(is_long.argmax())
    example = (
        f"{source[first].id} has {measured.lengths[first, 0]} source and {measured.lengths[first, 1]} target tokens, "
        f"allowed are {max_source_length} and {max_target_length}"
    )
    if refuse or number == len(source):
        raise DataError(
            f"{source.name}: {number:,} of {len(source):,} pairs are too long, such as {example}; raise the limits, "
            "split them at sentence ends, or have such pairs left out"
        )
    kept = np.flatnonzero(~is_long)
    return SelectedPairs(source, kept), measured.lengths[kept], number
