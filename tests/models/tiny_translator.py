"""Tiny translation networks of our own architecture."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmattn.models.translator import TranslatorConfig, TranslatorNetwork

VOCAB, EOS, PAD = 61, 0, 59

FORMS: dict[str, dict[str, Any]] = {
    "marian": {},
    "two vocabularies": {"target_vocab_size": 67, "tie_word_embeddings": False},
    "pre-norm, sinusoidal": {"norm_first": True, "position_offset": 3, "logits_bias": False},
    "tensor2tensor": {"norm_first": True, "positions": "tensor2tensor"},
    "learned positions, post-norm": {"positions": "learned", "scale_embedding": False},
    "rotary, grouped heads": {
        "positions": "rotary",
        "norm_first": True,
        "encoder_kv_heads": 1,
        "decoder_kv_heads": 2,
        "activation": "swiglu",
    },
    "one head for all keys": {"decoder_kv_heads": 1, "norm_eps": 1e-6},
}


def tiny_config(**overrides: Any) -> TranslatorConfig:
    values: dict[str, Any] = {
        "vocab_size": VOCAB,
        "embed_dim": 36,
        "encoder_layers": 2,
        "decoder_layers": 3,
        "encoder_heads": 3,
        "decoder_heads": 6,
        "encoder_ffn_dim": 37,
        "decoder_ffn_dim": 41,
        "max_positions": 29,
        "pad_token_id": PAD,
        "eos_token_id": EOS,
        "decoder_start_token_id": PAD,
    }
    return TranslatorConfig(**values | overrides)


def tiny_network(config: TranslatorConfig, *, seed: int = 0) -> TranslatorNetwork:
    """A network in evaluation mode, every parameter random, the logits bias too."""
    network = TranslatorNetwork(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            noise = 0.3 * torch.randn(tensor.shape, generator=generator)
            tensor.copy_(1 + noise.abs() if "norm" in name and name.endswith("weight") else noise)
    return network


def batch(rows: int, length: int, *, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Source ids `[rows, length]` and their mask; every second row is padded."""
    ids = tokens(rows, length, seed=seed)
    mask = torch.ones(rows, length, dtype=torch.bool)
    mask[1::2, length - 3 :] = False
    ids[~mask] = PAD
    return ids, mask


def tokens(rows: int, length: int, *, seed: int = 2) -> Tensor:
    """Random token ids that are not special."""
    return torch.randint(1, PAD, (rows, length), generator=torch.Generator().manual_seed(seed))
