"""Stock BLIP models with random weights, the reference of the BLIP parity tests."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from transformers import BlipConfig, BlipForConditionalGeneration, BlipForImageTextRetrieval, BlipForQuestionAnswering

transformers.logging.set_verbosity_error()

PAD, BOS, SEP, EOS = 0, 53, 41, 2
VOCAB = 59
STOCK_CLASSES = {
    "captioning": BlipForConditionalGeneration,
    "question_answering": BlipForQuestionAnswering,
    "matching": BlipForImageTextRetrieval,
}


def blip_config(*, vision_width: int = 26, **text_overrides: object) -> BlipConfig:
    """A tiny config; no two sizes that could be swapped are equal."""
    text = {
        "vocab_size": VOCAB,
        "hidden_size": 33,
        "num_attention_heads": 3,
        "num_hidden_layers": 3,
        "intermediate_size": 37,
        "max_position_embeddings": 29,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "sep_token_id": SEP,
        "pad_token_id": PAD,
        "label_smoothing": 0.1,
    }
    vision = {
        "hidden_size": vision_width,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "intermediate_size": 31,
        "image_size": 35,
        "patch_size": 7,
    }
    return BlipConfig(text_config=text | text_overrides, vision_config=vision, image_text_hidden_size=19)


def stock_model(task: str, *, seed: int = 0, **text_overrides: object) -> nn.Module:
    """A stock model in evaluation mode, every parameter random: biases, norms and position tables too."""
    # The answer decoder reads the question encoder's states, so stock needs equal widths for questions.
    width = 33 if task == "question_answering" else 26
    config = blip_config(vision_width=width, **text_overrides)
    if task == "question_answering":
        config.vision_config.num_attention_heads = 3
    model = STOCK_CLASSES[task](config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_norm = "norm" in name.lower() and name.endswith("weight")
            parameter.copy_(1 + 0.3 * noise if is_norm else 0.3 * noise)
    return model.eval()


def save_stock(model: nn.Module, folder: Path) -> Path:
    """Save with transformers, and give back the folder."""
    model.save_pretrained(folder)
    return folder


def pixels(count: int, *, seed: int = 1) -> Tensor:
    """Random normalised pictures `[count, 3, 35, 35]`."""
    return torch.randn(count, 3, 35, 35, generator=torch.Generator().manual_seed(seed))


def tokens(rows: int, length: int, *, seed: int = 2) -> Tensor:
    """Random ordinary token ids `[rows, length]`, the first one BOS."""
    ids = torch.randint(3, 40, (rows, length), generator=torch.Generator().manual_seed(seed))
    ids[:, 0] = BOS
    return ids


def assert_as_exact_as_stock(ours: Tensor, stock: Tensor, exact: Tensor, *, factor: int = 2) -> None:
    """Ours may differ from the float64 truth by at most `factor` times what stock float32 does, plus one rounding.

    The factor is 2, for gradients 3.
    """
    assert torch.isfinite(ours).all()
    assert ours.shape == exact.shape
    rounding = torch.finfo(torch.float32).eps * exact.abs().max().item()
    own_error = (ours.double() - exact).abs().max().item()
    stock_error = (stock.double() - exact).abs().max().item()
    assert own_error <= factor * stock_error + rounding, f"error {own_error:.3g}, stock's {stock_error:.3g}"
