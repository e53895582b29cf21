"""One denoising step of diffusers' models in their real sizes and random weights, stock and with swapped attention.

float16, both halves of guidance for one picture (batch 2); the same text again, as in every step after the first.
Compiled is `compile_repeated_blocks`: each kind of block once.
"""

from __future__ import annotations

import copy
import functools
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from diffusers import PixArtTransformer2DModel, UNet2DConditionModel
from measure import Options, Status, median_and_spread, read_options, wall_ms
from torch import Tensor

import mmattn
from tests.swap.zoo_base import liven

SD15 = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
SDXL = {
    "sample_size": 128,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SMALL = {
    "sample_size": 8,
    "cross_attention_dim": 32,
    "block_out_channels": (32, 64, 64),
    "transformer_layers_per_block": 1,
    "attention_head_dim": 4,
    "down_block_types": SDXL["down_block_types"],
    "up_block_types": SDXL["up_block_types"],
}
PIXART = {"num_layers": 28, "num_attention_heads": 16, "attention_head_dim": 72, "cross_attention_dim": 1152}
TINY_PIXART = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16, "cross_attention_dim": 32}
UNETS = {"SD 1.5 U-Net, 64 x 64": SD15, "SDXL U-Net, 128 x 128": SDXL}

Step = Callable[[Any], Tensor]


def made(model_class: Any, config: dict[str, Any], options: Options) -> Any:
    """Random weights, drawn on the device."""
    with torch.device(options.device):
        model = model_class(**config)
    dtype = torch.float16 if options.device == "cuda" else torch.float32
    return liven(model.to(options.device)).to(dtype)


def unet_step(model: Any) -> Step:
    """One forward on fixed inputs."""
    config, device, dtype = model.config, model.device, model.dtype
    side = config.sample_size
    sample = torch.randn(2, 4, side, side, device=device, dtype=dtype)
    text = torch.randn(2, 77, config.cross_attention_dim, device=device, dtype=dtype)
    added = None
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        sizes = torch.tensor([[1024.0, 1024, 0, 0, 1024, 1024]] * 2, device=device, dtype=dtype)
        added = {"text_embeds": torch.randn(2, pooled, device=device, dtype=dtype), "time_ids": sizes}
    when = torch.tensor(500, device=device)
    return lambda which: which(sample, when, text, added_cond_kwargs=added).sample


def pixart_step(model: Any, real: int) -> Step:
    """One forward; both texts have `real` tokens, padded to 300."""
    config, device, dtype = model.config, model.device, model.dtype
    side = config.sample_size
    sample = torch.randn(2, 4, side, side, device=device, dtype=dtype)
    text = torch.randn(2, 300, config.caption_channels, device=device, dtype=dtype)
    mask = (torch.arange(300, device=device) < real).long().expand(2, 300)
    when = torch.tensor([500, 500], device=device)
    sizes = {"resolution": None, "aspect_ratio": None}
    if side == 128:  # the version for 1024 pixels is told the size
        resolution, ratio = ([[1024.0, 1024.0]] * 2, [[1.0]] * 2)
        sizes = {"resolution": torch.tensor(resolution), "aspect_ratio": torch.tensor(ratio)}
        sizes = {name: values.to(device, dtype) for name, values in sizes.items()}
    return lambda which: which(sample, text, when, sizes, encoder_attention_mask=mask).sample


@torch.no_grad()
def rows_of(name: str, step: Step, variants: dict[str, Any], options: Options, status: Status) -> None:
    """Time models that compute the same, alternating; "stock" is the one that they are compared with. One that fails
    costs its own row only."""
    outputs = {}
    for variant, model in variants.items():
        with status.row(f"{name}, {variant}"):
            begin = time.perf_counter()
            outputs[variant] = step(model)
            print(f"  {name}, {variant}: first step {time.perf_counter() - begin:.1f} s", flush=True)
    stock = outputs["stock"].double()
    runs = {key: lambda model=variants[key]: step(model) for key in outputs}
    with options.turn():
        times = wall_ms(runs, 2 + 3 * options.repeats, options.device)
    base = median_and_spread(times["stock"])[0]
    for variant in outputs:
        middle, spread = median_and_spread(times[variant])
        apart = (outputs[variant].double() - stock).abs().max().item() / stock.abs().max().item()
        options.add(
            "One step of a diffusers model (float16, batch 2), ms",
            model=name,
            variant=variant,
            ms=f"{middle:.2f} ±{spread:.0%}",
            **{"stock / this": f"{base / middle:.3f}", "largest difference to stock": f"{apart:.1e} of the largest"},
        )


def swapped(model: Any, **arguments: Any) -> Any:
    """A copy with our attention."""
    model = copy.deepcopy(model)
    mmattn.swap_attention(model, **arguments)
    return model


def compiled(model: Any) -> Any:
    """A copy whose repeated blocks are compiled. (A copy of a swapped model is swapped too.)"""
    model = copy.deepcopy(model)
    model.compile_repeated_blocks(fullgraph=True)
    return model


def unet(name: str, options: Options) -> Any:
    """One of `UNETS`, stock."""
    return made(UNet2DConditionModel, UNETS[name] | (SMALL if options.tiny else {}), options)


def unets(options: Options, status: Status) -> None:
    """SD 1.5 and SDXL."""
    for name in UNETS:
        model = unet(name, options)
        rows_of(name, unet_step(model), {"stock": model, "swapped": swapped(model)}, options, status)


def compiled_unet(name: str, options: Options, status: Status) -> None:
    """The same, compiled."""
    model = unet(name, options)
    variants = {"stock": model, "compiled": compiled(model), "swapped, compiled": compiled(swapped(model))}
    rows_of(f"{name}, compiled", unet_step(model), variants, options, status)


def pixart(options: Options, status: Status) -> None:
    """The text's padding kept and dropped."""
    config = TINY_PIXART if options.tiny else PIXART
    config = config | {"sample_size": 16 if options.tiny else 128, "caption_channels": 64 if options.tiny else 4096}
    model = made(PixArtTransformer2DModel, config, options)
    variants = {
        "stock": model,
        "swapped, drop_padding": swapped(model),
        "swapped, padding kept": swapped(model, drop_padding=False),
    }
    for real in (20, 120):
        rows_of(f"PixArt, 128 x 128, {real} of 300 text tokens", pixart_step(model, real), variants, options, status)


JOBS: dict[str, Callable[[Options, Status], None]] = {
    "pixart": pixart,
    "unets": unets,
    **{f"compiled-{number}": functools.partial(compiled_unet, name) for number, name in enumerate(UNETS, start=1)},
}


def main() -> int:
    """PixArt, then the U-Nets; compiled last, so that a full table is there early."""
    options, status = read_options(__doc__, list(JOBS)), Status()
    for name in JOBS if options.only is None else [options.only]:
        with status.row(name):
            JOBS[name](options, status)
    return status.code


if __name__ == "__main__":
    sys.exit(main())
