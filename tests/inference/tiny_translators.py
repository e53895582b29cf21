"""Translator folders small enough for tests: stock Marian, NLLB and M2M100 with real tokenizers, and our own form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from mmattn.models.translator import TranslatorConfig, TranslatorNetwork, save_network
from tests.data.tiny_tokenizers import tiny_m2m100, tiny_nllb, tiny_opus
from tests.parity.translator_stock import stock_model

ENGLISH = [
    "The red circle is left of the blue square.",
    "A small cat sees two dogs.",
    "How many triangles are there?",
    "It is not green!",
    "One cat sleeps; the dogs run, too.",
]
GERMAN = [
    "Der rote Kreis ist links von dem blauen Quadrat.",
    "Eine kleine Katze sieht zwei Hunde.",
    "Wie viele Dreiecke gibt es?",
    "Es ist nicht grün!",
    "Eine Katze schläft; auch die Hunde laufen.",
]
POSITIONS = 53
KINDS = ("marian", "two vocabularies", "tags", "m2m100", "nllb")
# Seed and bias of the end token: chosen so that translations differ in length and in words.
SEEDS = {"marian": (9, 2.0), "two vocabularies": (1, 2.0), "tags": (7, 2.0), "m2m100": (0, 3.0), "nllb": (18, 2.0)}
LANGUAGES: dict[str, dict[str, Any]] = {
    "marian": {},
    "two vocabularies": {},
    "tags": {"tgt_lang": "fra"},
    "m2m100": {"src_lang": "en", "tgt_lang": "de"},
    "nllb": {"src_lang": "eng_Latn", "tgt_lang": "deu_Latn"},
}


def tokenizer_of(kind: str, folder: Path) -> PreTrainedTokenizerBase:
    """A trained tokenizer; `folder` takes the files that it lives on."""
    if kind == "m2m100":
        return tiny_m2m100([*ENGLISH, *GERMAN], folder)
    if kind == "nllb":
        return tiny_nllb([*ENGLISH, *GERMAN], ["eng_Latn", "deu_Latn", "fra_Latn"])
    tags = ["deu", "fra"] if kind == "tags" else []
    return tiny_opus(ENGLISH, GERMAN, folder, tags=tags, separate_vocabs=kind == "two vocabularies")


def save_stock_translator(folder: Path, kind: str, *, files: Path, **overrides: Any) -> Path:
    """A stock folder with random weights and a tokenizer, saved by transformers."""
    tokenizer = tokenizer_of(kind, files)
    size = max(tokenizer.get_vocab().values()) + 1
    seed, eos_bias = SEEDS[kind]
    sizes: dict[str, Any]
    if kind in ("m2m100", "nllb"):
        # Both have more entries than their vocabularies spell; M2M100's tokenizer says how many.
        stock_kind, sizes = "m2m100", {"vocab_size": size + (8 if kind == "m2m100" else 2)}
    else:
        special = {"pad_token_id": size - 1, "decoder_start_token_id": size - 1}
        stock_kind, sizes = "marian", {"vocab_size": size, "decoder_vocab_size": size, **special}
        if kind == "two vocabularies":
            sizes["share_encoder_decoder_embeddings"] = False
    values = sizes | {"max_position_embeddings": POSITIONS} | overrides
    model = stock_model(stock_kind, seed=seed, eos_bias=eos_bias, **values)
    if stock_kind == "marian":
        with torch.no_grad():  # the start token; Marian starts from nothing, so OPUS-MT's files have zeros there
            for name, parameter in model.named_parameters():
                if name.endswith(("shared.weight", "embed_tokens.weight")):
                    parameter[size - 1] = 0
    model.generation_config.no_repeat_ngram_size = 2  # or random weights repeat themselves
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def set_generation(folder: Path, **values: Any) -> None:
    """Change the folder's `generation_config.json`."""
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def save_own_translator(folder: Path, *, files: Path, **overrides: Any) -> Path:
    """A folder of a form that stock transformers does not have: rotary, grouped heads."""
    tokenizer = tokenizer_of("marian", files)
    size = max(tokenizer.get_vocab().values()) + 1
    torch.manual_seed(0)
    values: dict[str, Any] = {
        "vocab_size": size,
        "embed_dim": 36,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_heads": 3,
        "decoder_heads": 6,
        "decoder_kv_heads": 2,
        "encoder_ffn_dim": 37,
        "decoder_ffn_dim": 41,
        "positions": "rotary",
        "norm_first": True,
        "max_positions": POSITIONS,
        "pad_token_id": size - 1,
        "eos_token_id": 0,
        "decoder_start_token_id": size - 1,
    }
    network = TranslatorNetwork(TranslatorConfig(**values | overrides)).eval()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "norm" not in name:
                parameter.copy_(0.5 * torch.randn_like(parameter))
    save_network(network, folder)
    tokenizer.save_pretrained(folder)
    return folder


def stock_translate(model: Any, tokenizer: Any, text: str, **arguments: Any) -> list[str]:
    """One text by transformers' own means: the tokenizer, `generate`, the tokenizer."""
    arguments = {"max_length": POSITIONS, **arguments}
    if "max_new_tokens" in arguments:
        del arguments["max_length"]
    values = model.generation_config.to_dict() | arguments
    inputs = tokenizer(text, return_tensors="pt").to(model.device)
    with torch.no_grad():
        found = model.generate(**inputs, generation_config=GenerationConfig(**values))
    return [tokenizer.decode(row, skip_special_tokens=True).strip() for row in found]
