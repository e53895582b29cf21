"""Small pipelines whose transformers have joint attention, and its weights written out."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, StableDiffusion3Pipeline
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from mmattn.inference.diffusion.text_encoder_setup import TextEncoderConfig, new_text_encoder
from tests.inference.tiny_pipelines import WORDS
from tests.swap import zoo_dits
from tests.swap.zoo_base import liven, quiet, seeded

CLIP_TOKENS, T5_TOKENS = 11, 13


def _tokenizer(max_length: int) -> Any:
    config = TextEncoderConfig(width=8, num_layers=0, num_heads=1, max_length=max_length)
    return new_text_encoder([WORDS], config).tokenizer


def _clip(model: Any, tokenizer: Any, width: int, pooled: int) -> Any:
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    sizes = {"hidden_size": width, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), projection_dim=pooled, max_position_embeddings=CLIP_TOKENS, **sizes, **ids
    )
    return liven(model(config))


def _t5(tokenizer: Any) -> Any:
    ids = {name: getattr(tokenizer, name) for name in ("eos_token_id", "pad_token_id")}
    sizes = {"d_model": zoo_dits.TEXT, "d_kv": 7, "d_ff": 20, "num_layers": 2, "num_heads": 3}
    return liven(T5EncoderModel(T5Config(vocab_size=len(tokenizer), **sizes, **ids)))


def _vae(channels: int) -> Any:
    blocks = {"block_out_channels": (8, 8), "norm_num_groups": 4}
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return liven(AutoencoderKL(latent_channels=channels, shift_factor=0.1, **blocks, **kinds))


@seeded
def stable_diffusion_3() -> Any:
    """Stable Diffusion 3, shrunken: 2 CLIPs of 11 tokens, then T5."""
    clips, t5 = [_tokenizer(CLIP_TOKENS) for _ in range(2)], _tokenizer(T5_TOKENS)
    pipe = StableDiffusion3Pipeline(
        transformer=zoo_dits.build_sd35(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_vae(16),
        text_encoder=_clip(CLIPTextModelWithProjection, clips[0], 22, zoo_dits.POOLED // 2),
        tokenizer=clips[0],
        text_encoder_2=_clip(CLIPTextModelWithProjection, clips[1], 26, zoo_dits.POOLED // 2),
        tokenizer_2=clips[1],
        text_encoder_3=_t5(t5),
        tokenizer_3=t5,
    )
    return quiet(pipe)


@seeded
def flux() -> Any:
    """FLUX.1, shrunken: its words are T5's."""
    clip, t5 = _tokenizer(CLIP_TOKENS), _tokenizer(T5_TOKENS)
    pipe = FluxPipeline(
        transformer=zoo_dits.build_flux(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_vae(4),
        text_encoder=_clip(CLIPTextModel, clip, zoo_dits.POOLED, 6),
        tokenizer=clip,
        text_encoder_2=_t5(t5),
        tokenizer_2=t5,
    )
    return quiet(pipe)


@contextlib.contextmanager
def joint_weights(model: nn.Module, names: dict[int, str], dtype: torch.dtype):
    """Within the block the first fused call of every forward of the named layers adds its weights [R, H, L, L] over
    text and picture to `found[number]`."""
    found: dict[int, list[Tensor]] = {number: [] for number in names}
    stock, waiting, handles = F.scaled_dot_product_attention, [], []

    def attend(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if waiting:
            scores = query.to(dtype) @ key.to(dtype).mT * query.shape[-1] ** -0.5
            found[waiting.pop()].append(scores.softmax(-1))
        return stock(query, key, value, *args, **kwargs)

    for number, name in names.items():
        hook = lambda module, args, number=number: waiting.append(number)  # noqa: E731
        handles.append(model.get_submodule(name).register_forward_pre_hook(hook))
    F.scaled_dot_product_attention = attend  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield found
    finally:
        F.scaled_dot_product_attention = stock
        for handle in handles:
            handle.remove()
