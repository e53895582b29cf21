"""Models of transformers: translators, Whisper, and models that look at pictures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BlipConfig,
    BlipForConditionalGeneration,
    CLIPConfig,
    CLIPModel,
    M2M100Config,
    M2M100ForConditionalGeneration,
    MarianConfig,
    MarianMTModel,
    MllamaConfig,
    MllamaForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from .zoo_base import Draw, Family, liven, seeded

VOCAB = 101
SPREAD = 0.1  # of fresh weights, about what keeps the scale at such widths
SOURCES, TARGETS = (13, 7, 1), (11, 4, 9)  # lengths of the rows


def layers(feed_forward: int = 96, heads: int = 4, count: int = 2) -> dict[str, int]:
    """The sizes of both halves, by the names that Bart and its kin share."""
    sides = ("encoder", "decoder")
    names = {"layers": count, "attention_heads": heads, "ffn_dim": feed_forward}
    return {f"{side}_{name}": value for side in sides for name, value in names.items()}


@seeded
def build_marian() -> MarianMTModel:
    config = MarianConfig(
        vocab_size=VOCAB,
        d_model=64,
        **layers(),
        max_position_embeddings=64,
        activation_function="swish",
        scale_embedding=True,
        init_std=SPREAD,
        pad_token_id=VOCAB - 1,
        decoder_start_token_id=VOCAB - 1,
        eos_token_id=0,
        forced_eos_token_id=0,
    )
    return liven(MarianMTModel(config))


@seeded
def build_bart() -> BartForConditionalGeneration:
    config = BartConfig(vocab_size=VOCAB, d_model=60, **layers(heads=3), max_position_embeddings=64, init_std=SPREAD)
    return liven(BartForConditionalGeneration(config))


@seeded
def build_nllb() -> M2M100ForConditionalGeneration:
    config = M2M100Config(
        vocab_size=VOCAB,
        d_model=64,
        **layers(),
        encoder_layerdrop=0,
        decoder_layerdrop=0,
        max_position_embeddings=64,
        init_std=SPREAD,
    )
    return liven(M2M100ForConditionalGeneration(config))


def t5(**settings: Any) -> T5ForConditionalGeneration:
    sizes = {"d_model": 64, "d_kv": 24, "num_heads": 3, "d_ff": 96, "num_layers": 2}
    config = T5Config(vocab_size=VOCAB, **sizes, decoder_start_token_id=0, **settings)
    model = liven(T5ForConditionalGeneration(config))
    for half in (model.encoder, model.decoder):  # fresh biases are too small to matter
        half.block[0].layer[0].SelfAttention.relative_attention_bias.weight.data.normal_()
    return model


@seeded
def build_t5() -> T5ForConditionalGeneration:
    return t5()


@seeded
def build_flan_t5() -> T5ForConditionalGeneration:
    return t5(feed_forward_proj="gated-gelu", tie_word_embeddings=False)


def padded(draw: Draw, lengths: tuple[int, ...], pad: int) -> tuple[Tensor, Tensor]:
    """Rows of random tokens, and their padding mask."""
    mask = draw.lengths(*lengths)
    return draw.integers(VOCAB - 1, *mask.shape, low=3).masked_fill(mask == 0, pad), mask


def run_translator(mask_targets: bool) -> Callable[[Any], Tensor]:
    """Logits of padded rows; training seldom masks the targets' padding, generation of a batch does."""

    @torch.no_grad()
    def run(model: Any) -> Tensor:
        draw, pad = Draw(model), model.config.pad_token_id
        sources, source_mask = padded(draw, SOURCES, pad)
        targets, target_mask = padded(draw, TARGETS, pad)
        targets[:, 0] = model.config.decoder_start_token_id
        masks = {"decoder_attention_mask": target_mask} if mask_targets else {}
        return model(sources, attention_mask=source_mask, decoder_input_ids=targets, **masks).logits

    return run


@seeded
def build_whisper() -> WhisperForConditionalGeneration:
    config = WhisperConfig(
        vocab_size=VOCAB,
        d_model=60,
        **layers(heads=3),
        num_mel_bins=20,
        max_source_positions=75,
        max_target_positions=32,
        init_std=SPREAD,
        pad_token_id=VOCAB - 1,
        bos_token_id=VOCAB - 1,
        eos_token_id=VOCAB - 1,
        decoder_start_token_id=VOCAB - 2,
        begin_suppress_tokens=None,
    )
    return liven(WhisperForConditionalGeneration(config))


@torch.no_grad()
def run_whisper(model: Any) -> Tensor:
    draw = Draw(model)
    targets, mask = padded(draw, TARGETS, VOCAB - 1)
    sound = draw.normal(3, 20, 150)  # two frames to a position, as many as the model has
    return model(sound, decoder_input_ids=targets, decoder_attention_mask=mask).logits


@seeded
def build_blip() -> BlipForConditionalGeneration:
    text = {
        "vocab_size": VOCAB,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "max_position_embeddings": 32,
        "initializer_range": SPREAD,
        "bos_token_id": VOCAB - 2,
        "eos_token_id": 2,
        "sep_token_id": 2,
        "pad_token_id": 0,
    }
    vision = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 48,
        "patch_size": 8,
        "initializer_range": SPREAD,
    }
    return liven(BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=vision)))


@torch.no_grad()
def run_blip(model: Any) -> Tensor:
    draw = Draw(model)
    texts, mask = padded(draw, TARGETS, 0)
    return model(pixel_values=draw.normal(3, 3, 48, 48), input_ids=texts, attention_mask=mask).logits


@seeded
def build_mllama() -> MllamaForConditionalGeneration:
    text = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "cross_attention_layers": [1, 3],
        "max_position_embeddings": 128,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        "initializer_range": SPREAD,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    vision = {
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_global_layers": 2,
        "attention_heads": 3,
        "intermediate_layers_indices": [0, 1],
        "vision_output_dim": 3 * 48,
        "image_size": 42,
        "patch_size": 14,
        "initializer_range": SPREAD,
    }
    config = MllamaConfig(text_config=text, vision_config=vision, image_token_index=VOCAB)
    return liven(MllamaForConditionalGeneration(config))


@torch.no_grad()
def run_mllama(model: Any) -> Tensor:
    """Two pictures of four and two tiles; texts see theirs from the picture's token on."""
    draw = Draw(model)
    texts, mask = padded(draw, (13, 9), 0)
    tiles = draw.lengths(4, 2)
    sees = torch.zeros(2, 13, 1, 4, dtype=torch.long, device=draw.device)
    for row, (picture, end) in enumerate(((1, 13), (4, 9))):
        texts[row, picture] = VOCAB
        sees[row, picture:end, 0] = tiles[row]
    return model(
        input_ids=texts,
        attention_mask=mask,
        pixel_values=draw.normal(2, 1, 4, 3, 42, 42),
        aspect_ratio_ids=torch.tensor([[6], [2]], device=draw.device),  # 2 × 2 and 1 × 2
        aspect_ratio_mask=tiles[:, None],
        cross_attention_mask=sees,
    ).logits


@seeded
def build_vit() -> ViTModel:
    sizes = {"hidden_size": 60, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 3}
    return liven(ViTModel(ViTConfig(**sizes, image_size=48, patch_size=8, initializer_range=SPREAD)))


@torch.no_grad()
def run_vit(model: Any) -> Tensor:
    return model(Draw(model).normal(2, 3, 48, 48)).last_hidden_state


@seeded
def build_clip() -> CLIPModel:
    sizes = {"intermediate_size": 96, "num_hidden_layers": 2, "projection_dim": 32}
    ids = {"bos_token_id": VOCAB - 2, "eos_token_id": VOCAB - 1, "pad_token_id": VOCAB - 1}
    text = {**sizes, **ids, "hidden_size": 48, "num_attention_heads": 3, "vocab_size": VOCAB}
    vision = {**sizes, "hidden_size": 64, "num_attention_heads": 4, "image_size": 48, "patch_size": 8}
    model = liven(CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=32)), sharper=4)
    model.logit_scale.data.fill_(2.6592)
    return model


@torch.no_grad()
def run_clip(model: Any) -> Tensor:
    """The states of both sides in one row; a text's pooled state is its first end token's."""
    draw = Draw(model)
    texts, mask = padded(draw, (77, 12, 5), VOCAB - 1)
    texts[0, -1] = VOCAB - 1
    out = model(input_ids=texts, attention_mask=mask, pixel_values=draw.normal(2, 3, 48, 48))
    parts = (out.text_model_output[0], out.vision_model_output[0], out.logits_per_image)
    return torch.cat([part.flatten() for part in parts])


def family(name: str, build: Any, run: Any) -> Family:
    return Family(name, "transformers", build, run)


FAMILIES = {
    "marian": family("Marian", build_marian, run_translator(mask_targets=True)),
    "t5": family("T5", build_t5, run_translator(mask_targets=False)),
    "flan_t5": family("Flan-T5", build_flan_t5, run_translator(mask_targets=True)),
    "bart": family("BART", build_bart, run_translator(mask_targets=False)),
    "nllb": family("NLLB (M2M100)", build_nllb, run_translator(mask_targets=True)),
    "whisper": family("Whisper", build_whisper, run_whisper),
    "blip": family("BLIP", build_blip, run_blip),
    "mllama": family("Llama 3.2 Vision", build_mllama, run_mllama),
    "vit": family("ViT", build_vit, run_vit),
    "clip": family("CLIP", build_clip, run_clip),
}
