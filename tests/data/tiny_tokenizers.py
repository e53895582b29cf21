"""Small tokenizers of the kinds that public translators have, trained on a few sentences."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import sentencepiece
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import M2M100Tokenizer, NllbTokenizer

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
    return M2M100Tokenizer(str(folder / "vocab.json"), str(folder / "spm.model"))
