"""Text encoders small enough for tests: new ones, and folders of the kinds that are opened."""

from __future__ import annotations

from pathlib import Path

from transformers import (
    BertConfig,
    BertModel,
    BertTokenizer,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from mmattn.inference.diffusion.text_encoder_setup import TextEncoderConfig, new_text_encoder
from mmattn.inference.diffusion.text_encoding import TextEncoding
from tests.swap.zoo_base import liven

TEXTS = ["a red circle left of a blue square", "a big green star above a cross"]
LONG = "a red circle left of a blue square above a green star"
SMALL = {"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 3}
CLIP_IDS = {"bos_token_id": 1, "eos_token_id": 3, "pad_token_id": 0}


def new(**changes) -> TextEncoding:
    config = TextEncoderConfig(**{"width": 12, "num_heads": 3, "max_length": 11} | changes)
    return new_text_encoder(TEXTS, config)


def word_tokenizer(max_length: int = 17) -> PreTrainedTokenizerFast:
    return new(max_length=max_length).tokenizer


def text_config(vocab_size: int, **changes) -> CLIPTextConfig:
    values = SMALL | CLIP_IDS | {"max_position_embeddings": 17, "projection_dim": 14} | changes
    return CLIPTextConfig(vocab_size=vocab_size, **values)


def save_bert(folder: Path, model_class=BertModel) -> Path:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted({word for text in TEXTS for word in text.split()})]
    tokenizer = BertTokenizer(vocab={word: number for number, word in enumerate(words)})
    config = BertConfig(vocab_size=len(words), max_position_embeddings=19, **SMALL)
    liven(model_class(config)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_clip(folder: Path) -> Path:
    tokenizer = word_tokenizer()
    text = text_config(len(tokenizer)).to_dict()
    vision = SMALL | {"image_size": 8, "patch_size": 4, "projection_dim": 14}
    liven(CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=14))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_clip_with_projection(folder: Path) -> Path:
    tokenizer = word_tokenizer()
    liven(CLIPTextModelWithProjection(text_config(len(tokenizer)))).save_pretrained(folder / "text_encoder")
    tokenizer.save_pretrained(folder / "tokenizer")
    return folder


def save_t5(folder: Path) -> Path:
    tokenizer = word_tokenizer(max_length=23)
    sizes = {"d_model": 12, "d_kv": 5, "d_ff": 20, "num_layers": 2, "num_heads": 3}
    config = T5Config(vocab_size=len(tokenizer), **sizes, pad_token_id=0, eos_token_id=3, decoder_start_token_id=0)
    liven(T5ForConditionalGeneration(config)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


SAVERS = {"clip": save_clip, "clip with projection": save_clip_with_projection, "t5": save_t5, "bert": save_bert}
