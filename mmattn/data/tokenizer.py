"""Tokenizers trained on the data set's own texts, as ordinary transformers tokenizers.

Both kinds give back exactly the text that went in (up to Unicode NFC, runs of spaces and, when asked for, case),
so that exact match compares texts and not spacing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from mmattn.data.records import TextItem
from mmattn.errors import DataError, UsageError

PAD, BOS, SEP, EOS, UNK = "[PAD]", "[BOS]", "[SEP]", "[EOS]", "[UNK]"
SPECIAL_TOKENS = (PAD, BOS, SEP, EOS, UNK)


def train_tokenizer(
    texts: Iterable[str], kind: str = "word", *, vocab_size: int = 8000, min_count: int = 1, lowercase: bool = False
) -> PreTrainedTokenizerFast:
    """Trains a tokenizer; equal texts give an equal tokenizer, whatever their order.

    Args:
        texts: Captions, answers and questions of the training split.
        kind: "word" for small closed vocabularies (a token per word or punctuation mark; other words become
            `[UNK]`), "bpe" for natural text (byte-level, nothing is unknown).
        vocab_size: Upper bound, special tokens included; the most frequent entries stay.
        min_count: Entries seen less often are left out.
        lowercase: Fold case.

    Returns:
        A tokenizer with pad, bos, sep, eos and unk tokens (ids 0 to 4) that adds none of them by itself.

    Raises:
        DataError: no text at all.
        UsageError: an unknown kind, or a vocabulary too small for it.
    """
    counts = Counter(texts)
    if not any(text.strip() for text in counts):
        raise DataError("no texts to train a tokenizer on: the data set's texts are all empty")
    if kind not in ("word", "bpe"):
        raise UsageError(f"unknown tokenizer kind {kind!r}: use word or bpe")
    smallest = len(SPECIAL_TOKENS) + (256 if kind == "bpe" else 1)
    if vocab_size < smallest:
        raise UsageError(f"vocab_size {vocab_size} is too small for a {kind} tokenizer: use {smallest} or more")
    build = _word_tokenizer if kind == "word" else _bpe_tokenizer
    # transformers 5 cleans nothing up unless asked, but a saved tokenizer may be opened by others.
    return PreTrainedTokenizerFast(
        tokenizer_object=build(counts, vocab_size, min_count, _normalizer(lowercase)),
        pad_token=PAD,
        bos_token=BOS,
        sep_token=SEP,
        eos_token=EOS,
        unk_token=UNK,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )


def item_texts(items: Iterable[TextItem]) -> list[str]:
    """Captions, answers and questions, to train a tokenizer on."""
    return [text for item in items for text in (item.question, item.text) if text]


def _normalizer(lowercase: bool) -> normalizers.Normalizer:
    steps = [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    return normalizers.Sequence([*steps, normalizers.Lowercase()] if lowercase else steps)


def _word_tokenizer(
    counts: Counter[str], vocab_size: int, min_count: int, normalizer: normalizers.Normalizer
) -> Tokenizer:
    # A word carries its leading space as "▁", so "red circle?" comes back with no space before "?".
    splitter = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()])
    words: Counter[str] = Counter()
    for text, count in counts.items():
        for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text)):
            words[word] += count
    for special in SPECIAL_TOKENS:
        words.pop(special, None)
    frequent = sorted((word for word in words if words[word] >= min_count), key=lambda word: (-words[word], word))
    entries = [*SPECIAL_TOKENS, *frequent[: vocab_size - len(SPECIAL_TOKENS)]]
    tokenizer = Tokenizer(models.WordLevel({word: position for position, word in enumerate(entries)}, unk_token=UNK))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def _bpe_tokenizer(
    counts: Counter[str], vocab_size: int, min_count: int, normalizer: normalizers.Normalizer
) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token=UNK))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=max(min_count, 2),
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sorted(counts.elements()), trainer)
    return tokenizer
