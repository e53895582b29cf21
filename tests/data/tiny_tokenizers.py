"""Small tokenizers of the kinds that public translators have, trained on a few sentences."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path

import sentencepiece
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import M2M100Tokenizer, MarianTokenizer, NllbTokenizer
from transformers.models.m2m_100.tokenization_m2m_100 import FAIRSEQ_LANGUAGE_CODES

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]


def tiny_nllb(texts: Sequence[str], languages: Sequence[str] = ("eng_Latn", "deu_Latn", "fra_Latn")) -> NllbTokenizer:
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True)
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=120, special_tokens=SPECIAL, show_progress=False))
    model = json.loads(bpe.to_str())["model"]
    return NllbTokenizer(
        vocab=model["vocab"],
        merges=[tuple(merge) for merge in model["merges"]],
        additional_special_tokens=list(languages),
        src_lang=languages[0],
    )


def tiny_m2m100(texts: Sequence[str], folder: Path) -> M2M100Tokenizer:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_prefix=str(folder / "spm"),
        vocab_size=120,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    spm = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spm.model"))
    pieces = [spm.id_to_piece(number) for number in range(3, len(spm))]
    vocab = {piece: number for number, piece in enumerate([*SPECIAL, *pieces])}
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    # The public folders name them in special_tokens_map.json.
    special = [f"__{code}__" for code in FAIRSEQ_LANGUAGE_CODES["m2m100"]]
    files = (str(folder / "vocab.json"), str(folder / "spm.model"))
    return M2M100Tokenizer(*files, additional_special_tokens=special)


def tiny_opus(
    sources: Sequence[str],
    targets: Sequence[str],
    folder: Path,
    *,
    tags: Sequence[str] = (),
    separate_vocabs: bool = False,
) -> MarianTokenizer:
    """A sentencepiece model for each side, as OPUS-MT's; their pieces in one vocabulary, or in one for each side."""
    pieces = []
    for name, texts in (("source.spm", sources), ("target.spm", targets)):
        stream = io.BytesIO()
        options = {"vocab_size": 90, "hard_vocab_limit": False, "character_coverage": 1.0, "minloglevel": 2}
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(texts), model_writer=stream, **options)
        (folder / name).write_bytes(stream.getvalue())
        spm = sentencepiece.SentencePieceProcessor(model_proto=stream.getvalue())
        pieces.append([spm.id_to_piece(number) for number in range(3, len(spm))])
    first = ["</s>", "<unk>"]
    if separate_vocabs:
        # The padding has one number for both sides, so the shorter vocabulary is filled up.
        length = max(map(len, pieces))
        filled = [[*side, *(f"unused{number}" for number in range(length - len(side)))] for side in pieces]
        entries = {"vocab.json": filled[0], "target_vocab.json": filled[1]}
    else:
        entries = {"vocab.json": [*dict.fromkeys([*pieces[0], *pieces[1]]), *(f">>{tag}<<" for tag in tags)]}
    for name, names in entries.items():
        vocab = {entry: number for number, entry in enumerate([*first, *names, "<pad>"])}
        (folder / name).write_text(json.dumps(vocab), encoding="utf-8")
    return MarianTokenizer(
        *(str(folder / name) for name in ("source.spm", "target.spm", "vocab.json")),
        target_vocab_file=str(folder / "target_vocab.json") if separate_vocabs else None,
        separate_vocabs=separate_vocabs,
        source_lang="en",
        target_lang="de",
    )
