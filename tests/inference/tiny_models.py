"""Model folders small enough for tests: stock BLIP of each kind, and our own captioning network."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
    BlipProcessor,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from mmattn.data.tokenizer import train_tokenizer
from mmattn.models.vlm import ImageEncoderConfig, TextConfig, VLMConfig, build_network, save_network

WORDS = "a picture of red blue green circle square cat dog what colour is the how many ? there left right two one ##s"
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]"]
STOCK = {
    "captioning": BlipForConditionalGeneration,
    "question_answering": BlipForQuestionAnswering,
    "matching": BlipForImageTextRetrieval,
}


def pictures(count: int = 3, seed: int = 0) -> list[Image.Image]:
    """RGB noise of different sizes."""
    random = np.random.default_rng(seed)
    sizes = [(random.integers(11, 41), random.integers(11, 41), 3) for _ in range(count)]
    return [Image.fromarray(random.integers(0, 256, size, dtype=np.uint8)) for size in sizes]


def blip_processor(image_size: int = 24) -> BlipProcessor:
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *WORDS.split()])}
    tokenizer = BertTokenizer(vocab=vocabulary)
    size = {"height": image_size, "width": image_size}
    return BlipProcessor(BlipImageProcessorPil(size=size), tokenizer)


def save_stock(folder: Path, task: str, seed: int = 0, spread: float = 0.25) -> Path:
    """A stock BLIP folder with random weights; `spread` makes its texts depend on the picture."""
    torch.manual_seed(seed)
    vocab_size = len(SPECIAL) + len(WORDS.split())
    # The answer decoder's context is the question encoder's output, and stock has one setting for both widths.
    image_width = 16 if task == "question_answering" else 20
    text = {
        "vocab_size": vocab_size,
        "hidden_size": 16,
        "encoder_hidden_size": image_width,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 48,
        "bos_token_id": 5,
        "eos_token_id": 4,
        "sep_token_id": 3,
        "pad_token_id": 0,
        "initializer_range": spread,
    }
    vision = {
        "hidden_size": image_width,
        "intermediate_size": 28,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 24,
        "patch_size": 8,
        "initializer_range": spread,
    }
    config = BlipConfig(text_config=text, vision_config=vision, projection_dim=12, image_text_hidden_size=12)
    model = STOCK[task](config).eval()
    with torch.no_grad():  # fresh biases and norms are 0 and 1, which would hide a mix-up
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            elif "word_embeddings" in name:
                parameter.mul_(2)
    model.save_pretrained(folder)
    blip_processor().save_pretrained(folder)
    return folder


def save_own(folder: Path, seed: int = 0) -> Path:
    """A folder of our own captioning network, which also answers."""
    torch.manual_seed(seed)
    tokenizer = train_tokenizer([WORDS.replace(" ##s", "")])
    image = ImageEncoderConfig(
        kind="conv",
        image_size=16,
        embed_dim=20,
        num_layers=1,
        num_heads=2,
        ffn_dim=24,
        conv_channels=[5, 7],
        convs_per_stage=[1, 2],
        grid=8,
    )
    text = TextConfig(
        vocab_size=len(tokenizer),
        embed_dim=16,
        num_layers=2,
        num_heads=2,
        ffn_dim=24,
        max_positions=48,
        initializer_range=0.5,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        sep_token_id=tokenizer.sep_token_id,
    )
    save_network(build_network(VLMConfig("captioning", image, text)).eval(), folder)
    tokenizer.save_pretrained(folder)
    BlipImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder
