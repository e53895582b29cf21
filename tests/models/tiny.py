"""Tiny vision-language networks of our own architecture."""

from __future__ import annotations

from typing import Any

import torch

from mmattn.models.vlm import ImageEncoderConfig, TextConfig, VisionLanguageNetwork, VLMConfig, build_network

VOCAB = 43


def tiny_config(task: str = "captioning", *, image: dict[str, Any] | None = None, **text: Any) -> VLMConfig:
    """A config with a convolutional image encoder; keyword arguments change the text network."""
    image_values = {
        "kind": "conv",
        "image_size": 12,
        "embed_dim": 22,
        "num_layers": 1,
        "num_heads": 2,
        "ffn_dim": 29,
        "conv_channels": [5, 7, 13],
        "convs_per_stage": [1, 1, 1],
        "grid": 3,
    }
    text_values = {
        "vocab_size": VOCAB,
        "embed_dim": 33,
        "num_layers": 4,
        "num_heads": 3,
        "ffn_dim": 37,
        "max_positions": 23,
    }
    return VLMConfig(
        task=task,
        image=ImageEncoderConfig(**image_values | (image or {})),
        text=TextConfig(**text_values | text),
        image_text_dim=17,
    )


def tiny_network(config: VLMConfig, *, seed: int = 0) -> VisionLanguageNetwork:
    """A network in evaluation mode, every parameter and running statistic random."""
    network = build_network(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if tensor.is_floating_point():
                noise = 0.3 * torch.randn(tensor.shape, generator=generator)
                tensor.copy_(1 + noise.abs() if "norm" in name or "running_var" in name else noise)
    return network


def pixels(count: int, *, size: int = 12, seed: int = 1) -> torch.Tensor:
    """Random pictures."""
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def tokens(rows: int, length: int, *, seed: int = 2) -> torch.Tensor:
    """Random token ids that are neither padding nor special."""
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))
