"""Joint sentencepiece vocabularies trained on a parallel corpus, as Marian tokenizers like those of OPUS-MT.

Decoding gives back the text that went in, up to runs of spaces, so that exact match compares texts and not spacing.
"""

from __future__ import annotations

import io
import json
import re
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mmattn._optional import require
from mmattn.errors import DataError, UsageError

if TYPE_CHECKING:
    from transformers import MarianTokenizer

KINDS = ("word", "bpe", "unigram")
EOS, UNK, PAD = "</s>", "<unk>", "<pad>"
_META = 3  # sentencepiece's own <unk>, <s> and </s>; Marian's </s>, <unk> and <pad> take their room
_BYTES = 256
_MARKS = ",.?!;:"  # what "word" splits from the word before
_SPACES = "\t\n\r\u00a0"


def train_marian_tokenizer(
    texts: Iterable[str],
    kind: str = "unigram",
    vocab_size: int = 8000,
    *,
    languages: Sequence[str] = (),
    byte_fallback: bool = True,
    source_lang: str | None = None,
    target_lang: str | None = None,
    folder: str | Path | None = None,
) -> MarianTokenizer:
    """Trains one vocabulary for source and target; equal texts give an equal tokenizer, whatever their order.

    The vocabulary is laid out as in OPUS-MT: `</s>` 0, `<unk>` 1, language tokens, pieces, `<pad>` last, which is
    what `ct2-transformers-converter` expects.

    Args:
        texts: Sentences of both languages, of the training split.
        kind: "word" for small closed vocabularies (a token per word or punctuation mark; other words become `<unk>`),
            "bpe" or "unigram" for natural text.
        vocab_size: Upper bound, special tokens included; fewer where the texts do not give as many.
        languages: Target languages, where there are several: each gets a token `>>de<<` that starts the source text.
        byte_fallback: Keep 256 entries for the bytes of characters that training never showed, so that nothing is
            unknown ("bpe" and "unigram").
        source_lang, target_lang: Written into the tokenizer's settings.
        folder: Where the tokenizer's files are written; None for a temporary folder that lives as long as the
            tokenizer.

    Raises:
        DataError: no text at all.
        UsageError: an unknown kind, a language name with spaces, or a vocabulary too small for the texts.
        OptionalPackageError: sentencepiece is not installed.
    """
    if kind not in KINDS:
        raise UsageError(f"unknown tokenizer kind {kind!r}: use one of {', '.join(KINDS)}")
    tags = [_tag(language) for language in dict.fromkeys(languages)]
    has_bytes = byte_fallback and kind != "word"
    smallest = _META + len(tags) + 1 + (_BYTES if has_bytes else 0)
    if vocab_size < smallest:
        hint = ", or set byte_fallback=False" if has_bytes else ""
        raise UsageError(f"vocab_size {vocab_size} is too small for a {kind} tokenizer: use {smallest} or more{hint}")
    lines = sorted(line for text in texts if (line := text.strip()))
    if not lines:
        raise DataError("no texts to train a tokenizer on: the data set's texts are all empty")
    model = _train(lines, kind, vocab_size - len(tags), has_bytes)
    return _marian_tokenizer(model, tags, source_lang, target_lang, folder)


def _tag(language: str) -> str:
    if not language or language.split() != [language] or "<" in language or ">" in language:
        raise UsageError(f"{language!r} cannot name a language: use a code such as de or pt_BR")
    return f">>{language}<<"


def _train(lines: Sequence[str], kind: str, vocab_size: int, has_bytes: bool) -> bytes:
    """A sentencepiece model as bytes."""
    sentencepiece = require("sentencepiece", "training a translation tokenizer")
    options = {
        "model_type": kind,
        "vocab_size": vocab_size,
        "hard_vocab_limit": False,
        "byte_fallback": has_bytes,
        "character_coverage": 0.9999 if has_bytes else 1.0,
        "max_sentence_length": max(4192, 4 * max(len(line) for line in lines)),
        "num_threads": 1,  # the sums of unigram training depend on the number
        "minloglevel": 2,
    }
    stream = io.BytesIO()
    with tempfile.TemporaryDirectory() as folder:
        options |= _word_rules(Path(folder)) if kind == "word" else {"normalization_rule_name": "identity"}
        try:
            sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=stream, **options)
        except RuntimeError as error:  # sentencepiece has no other
            raise UsageError(f"no {kind} tokenizer of {vocab_size} entries can be trained: {_reason(error)}") from error
    return _without_rule_paths(stream.getvalue())


def _without_rule_paths(model: bytes) -> bytes:
    """A sentencepiece model without the names of its rule files, which are temporary and differ from run to run.

    The rules themselves are compiled in. The fields are those of sentencepiece_model.proto: 3 and 5 are the
    (de)normaliser's settings, in which 6 is the file's name.
    """
    parts = []
    for number, field, content in _protobuf_fields(model):
        if number in (3, 5):
            kept = b"".join(inner for inner_number, inner, _ in _protobuf_fields(content) if inner_number != 6)
            field = bytes([number << 3 | 2]) + _varint(len(kept)) + kept
        parts.append(field)
    return b"".join(parts)


def _protobuf_fields(message: bytes) -> Iterator[tuple[int, bytes, bytes]]:
    """(number, whole field, content) of a message's fields, by the protobuf wire format."""
    place = 0
    while place < len(message):
        start = place
        tag, place = _read_varint(message, place)
        kind = tag & 7
        if kind == 0:
            _, end = _read_varint(message, place)
        elif kind == 2:
            size, place = _read_varint(message, place)
            end = place + size
        else:
            end = place + (8 if kind == 1 else 4)
        yield tag >> 3, message[start:end], message[place:end]
        place = end


def _read_varint(message: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[place]
        value |= (byte & 127) << shift
        place, shift = place + 1, shift + 7
        if byte < 128:
            return value, place


def _varint(value: int) -> bytes:
    parts = bytearray()
    while value > 127:
        parts.append(value & 127 | 128)
        value >>= 7
    return bytes([*parts, value])


def _reason(error: RuntimeError) -> str:
    needed = re.search(r"smaller than required_chars\. \d+ vs (\d+)", str(error))
    if needed is not None:
        return f"the characters of the texts alone take {needed[1]}; raise vocab_size"
    return str(error).strip().splitlines()[-1].rpartition("] ")[2]


def _word_rules(folder: Path) -> dict[str, str]:
    """Splits punctuation off words when encoding, and puts it back when decoding, by normalisation rules."""
    rules = folder / "normalization.tsv"
    spaces = [f"{ord(space):X}\t20" for space in _SPACES]
    rules.write_text("\n".join([*spaces, *(f"{ord(mark):X}\t20 {ord(mark):X}" for mark in _MARKS), ""]))
    back = folder / "denormalization.tsv"
    back.write_text("\n".join([*(f"20 {ord(mark):X}\t{ord(mark):X}" for mark in _MARKS), ""]))
    return {"normalization_rule_tsv": str(rules), "denormalization_rule_tsv": str(back)}


def _marian_tokenizer(
    model: bytes, tags: Sequence[str], source_lang: str | None, target_lang: str | None, folder: str | Path | None
) -> MarianTokenizer:
    from transformers import MarianTokenizer

    processor = require("sentencepiece", "a translation tokenizer").SentencePieceProcessor(model_proto=model)
    pieces = [processor.id_to_piece(number) for number in range(_META, len(processor))]
    reserved = {EOS, UNK, PAD, *tags}
    entries = [EOS, UNK, *tags, *(piece for piece in pieces if piece not in reserved), PAD]
    where = Path(tempfile.mkdtemp(prefix="mmattn-tokenizer-")) if folder is None else Path(folder)
    where.mkdir(parents=True, exist_ok=True)
    for name in ("source.spm", "target.spm"):
        (where / name).write_bytes(model)
    vocab = json.dumps({entry: number for number, entry in enumerate(entries)}, ensure_ascii=False, indent=2)
    (where / "vocab.json").write_text(vocab, encoding="utf-8")
    tokenizer = MarianTokenizer(
        str(where / "source.spm"),
        str(where / "target.spm"),
        str(where / "vocab.json"),
        source_lang=source_lang,
        target_lang=target_lang,
        clean_up_tokenization_spaces=False,
    )
    if folder is None:
        weakref.finalize(tokenizer, shutil.rmtree, where, ignore_errors=True)
    else:
        tokenizer.save_pretrained(where)
    return tokenizer
