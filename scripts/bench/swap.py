"""Swapped attention beside stock diffusers: time and output, alternating in one process.

    python scripts/bench/swap.py --case sd --threads 2 --json runs/swap_sd.json

sd      25 steps of a small Stable Diffusion pipeline; the goal is the same picture at no loss
pixart  a PixArt-like transformer of 55 M parameters: 300 text tokens of which 20 are real, both halves of guidance,
        the same text at every step; the goal is what leaving the padding out and projecting the text once are worth
gate    8 steps of a U-Net of Stable Diffusion 1.5's size with `gate` at half of them: approximate, so the likeness to
        stock's picture is printed over several gate steps. Weights are random: the figure says nothing about pictures
        of trained weights

Real classes, random weights, float32. A row is the ratio of medians, stock's time by ours; each run starts with a fresh
swap, so its caches are empty. Beside "auto" every backend that can be used here.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    PixArtTransformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from results import facts, finish  # noqa: E402

import mmattn  # noqa: E402
from mmattn.errors import MmattnError  # noqa: E402
from mmattn.ops.observe import AttentionCall, observing  # noqa: E402
from mmattn.ops.tolerance import deviation  # noqa: E402
from mmattn.swap.attend import computing_reference  # noqa: E402
from tests.swap.zoo_base import liven, quiet, seeded  # noqa: E402

Run = Callable[[Any], Tensor]  # takes the swap, None for stock
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@dataclass
class Row:
    """One variant beside stock; without a goal it is only shown."""

    name: str
    value: float
    goal: float | None
    stock_ms: float
    ours_ms: float
    stock_spread: float
    ours_spread: float
    difference: float
    same: bool
    backends: list[str]

    @property
    def is_ok(self) -> bool:
        """Whether the goal is reached; an approximate method need not give the same."""
        return self.goal is None or (self.value >= self.goal and self.same)


@dataclass(frozen=True)
class Variant:
    """Arguments of `swap_attention`, a goal, and whether our output must be stock's; `arguments` None is stock."""

    name: str
    arguments: dict[str, Any] | None
    goal: float | None = None
    is_exact: bool = True


def timed(target: Any, arguments: dict[str, Any] | None, run: Run) -> tuple[Tensor, float]:
    """One run: its output, and milliseconds without the swapping itself."""
    swap = contextlib.nullcontext() if arguments is None else mmattn.swap_attention(target, **arguments)
    with swap as swapped:
        begin = time.perf_counter()
        output = run(swapped)
        return output, (time.perf_counter() - begin) * 1000


def compare(case: str, target: Any, run: Run, variants: list[Variant], repeats: int, same: Callable[..., bool]) -> Any:
    """Time stock and the variants in turn: the rows, and stock's output.

    Args:
        case: printed before each variant's name.
        target: what is swapped.
        run: what is timed.
        variants: beside stock.
        repeats: timed runs of each, after one that only warms up.
        same: whether a variant's output is stock's: `same(arguments, ours, stock)`.
    """
    stock, _ = timed(target, None, run)
    ready: list[tuple[Variant, Tensor, list[str]]] = []
    for variant in variants:
        calls: list[AttentionCall] = []
        try:
            with observing(lambda call, calls=calls: calls.append(f"{call.role}: {call.backend}")):
                output, _ = timed(target, variant.arguments, run)
        except MmattnError as error:
            print(f"{case}, {variant.name}: {error}", flush=True)
            continue
        ready.append((variant, output, sorted(set(calls))))
    times: dict[str, list[float]] = {"": [], **{variant.name: [] for variant, *_ in ready}}
    for _ in range(repeats):
        times[""].append(timed(target, None, run)[1])
        for variant, *_ in ready:
            times[variant.name].append(timed(target, variant.arguments, run)[1])
    rows = []
    for variant, output, backends in ready:
        is_same = not variant.is_exact or same(variant.arguments, output, stock)
        difference = (output.double() - stock.double()).abs().max().item()
        middles = [statistics.median(times[name]) for name in ("", variant.name)]
        spreads = [
            (max(times[name]) - min(times[name])) / statistics.median(times[name]) for name in ("", variant.name)
        ]
        name, ratio = f"{case}, {variant.name}", middles[0] / middles[1]
        rows.append(Row(name, ratio, variant.goal, *middles, *spreads, difference, is_same, backends))
        show(rows[-1])
    return rows, stock


def show(row: Row) -> None:
    """Print a row."""
    goal = "" if row.goal is None else f"{row.goal:.2f}x"
    verdict = "" if row.goal is None else "ok" if row.is_ok else "short"
    print(
        f"{row.name:<42} {row.stock_ms:>9.1f} {row.ours_ms:>9.1f} {row.value:>6.2f}x {goal:>6}  {verdict:<5}  "
        f"±{50 * row.stock_spread:.0f}/{50 * row.ours_spread:.0f} %  difference {row.difference:.1e}"
        f"{'' if row.same else ' (NOT the same)'}  {', '.join(row.backends)}",
        flush=True,
    )


def beside_stock(goal: float) -> list[Variant]:
    """Ours with "auto", which has the goal, and with each backend that can be used here."""
    names = [row.name for row in mmattn.backends() if row.is_usable]
    return [Variant("auto", {}, goal), *(Variant(name, {"backend": name}) for name in names)]


def within_tolerance(target: Any, run: Run, arguments: dict[str, Any], ours: Tensor, stock: Tensor) -> bool:
    """The tolerance rule, for ours and for stock beside the same output with attention in float64."""
    references = []
    for kind in ("eager", "float64"):
        with computing_reference(kind):
            references.append(timed(target, arguments, run)[0])
    found = deviation(ours, *references)
    return found.is_within and (ours.double() - stock.double()).abs().max().item() <= 2 * found.bound


def make_pipeline(unet: dict[str, Any]) -> StableDiffusionPipeline:
    """Stable Diffusion's pipeline without text encoder; the image decoder is small."""
    sizes = (32, 32, 64, 64)
    vae = AutoencoderKL(
        block_out_channels=sizes,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        layers_per_block=1,
    )
    absent = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    scheduler = DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    model = liven(UNet2DConditionModel(**unet), louder=1.5)
    return quiet(
        StableDiffusionPipeline(liven(vae), unet=model, scheduler=scheduler, requires_safety_checker=False, **absent)
    )


@torch.no_grad()
def draw(pipe: Any, side: int, steps: int, swapped: Any) -> Tensor:
    """A picture, 0 to 1, from fixed latents and texts."""
    generator = torch.Generator().manual_seed(1)
    width = pipe.unet.config.cross_attention_dim
    texts = {
        name: torch.randn(1, 77, width, generator=generator) for name in ("prompt_embeds", "negative_prompt_embeds")
    }
    latents = torch.randn(1, 4, side, side, generator=generator)
    gate = None if swapped is None else swapped.gate
    settings = {"num_inference_steps": steps, "guidance_scale": 7.5, "output_type": "pt", "height": 8 * side}
    settings |= {"width": 8 * side}
    return pipe(**texts, latents=latents, callback_on_step_end=gate, **settings).images


def same_picture(_: Any, ours: Tensor, stock: Tensor) -> bool:
    """Within one step of a byte, of pictures that show something."""
    return stock.std().item() > 0.02 and (ours - stock).abs().max().item() <= 1 / 255


def sd_case(is_tiny: bool, repeats: int) -> list[Row]:
    """A small Stable Diffusion."""
    sizes, side, steps = ((32, 64, 64, 64), 8, 3) if is_tiny else ((128, 256, 256, 256), 32, 25)
    config = {"block_out_channels": sizes, "cross_attention_dim": 512, "attention_head_dim": 8}
    pipe = seeded(functools.partial(make_pipeline, config))()
    run = functools.partial(draw, pipe, side, steps)
    return compare(f"sd, {steps} steps", pipe, run, beside_stock(0.98), repeats, same_picture)[0]


def make_pixart(is_tiny: bool) -> PixArtTransformer2DModel:
    heads, layers, texts = (2, 2, 64) if is_tiny else (8, 12, 4096)
    config = {"num_attention_heads": heads, "attention_head_dim": 64, "cross_attention_dim": heads * 64}
    model = PixArtTransformer2DModel(**config, num_layers=layers, caption_channels=texts, sample_size=32)
    return liven(model, louder=2)


@torch.no_grad()
def denoise(model: Any, side: int, steps: int, swapped: Any) -> Tensor:
    """Latents after some steps with guidance; both prompts have 20 tokens, padded to 300."""
    generator = torch.Generator().manual_seed(1)
    texts = torch.randn(2, 300, model.config.caption_channels, generator=generator)
    mask = (torch.arange(300) < 20).long().expand(2, 300)
    latents = torch.randn(1, 4, side, side, generator=generator)
    scheduler = DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    scheduler.set_timesteps(steps)
    sizes = {"resolution": None, "aspect_ratio": None}
    for step in scheduler.timesteps:
        both = torch.cat([latents] * 2)
        noise = model(both, texts, step.expand(2), sizes, encoder_attention_mask=mask).sample[:, :4]
        without, with_prompt = noise.chunk(2)
        latents = scheduler.step(without + 4.5 * (with_prompt - without), step, latents).prev_sample
    return latents


def pixart_case(is_tiny: bool, repeats: int) -> list[Row]:
    """Padded texts; 32 x 32 latents for comparison, where the picture weighs more."""
    model, steps = seeded(functools.partial(make_pixart, is_tiny))(), 2 if is_tiny else 10
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    rows = []
    for side, goal in ((16, 1.4), (32, None)):
        run = functools.partial(denoise, model, side, steps)
        same = functools.partial(within_tolerance, model, run)
        variants = beside_stock(1.4) if goal else [Variant("auto", {})]
        parts = {"padding kept": {"drop_padding": False}, "text not cached": {"cache_context": False}}
        variants += [Variant(name, arguments) for name, arguments in parts.items()]
        name = f"pixart {millions:.0f} M, {side} x {side}"
        rows += compare(name, model, run, variants, repeats, same)[0]
    return rows


def gate_case(is_tiny: bool, repeats: int) -> list[Row]:
    """Stable Diffusion 1.5's U-Net with the gate at half the steps, and pictures at other gates."""
    side, steps = (8, 4) if is_tiny else (32, 8)
    config: dict[str, Any] = {"cross_attention_dim": 768, "attention_head_dim": 8, "sample_size": 64}
    config |= {"block_out_channels": (32, 64, 64, 64)} if is_tiny else {}
    pipe = seeded(functools.partial(make_pipeline, config))()
    run = functools.partial(draw, pipe, side, steps)
    half = steps // 2
    variants = [Variant(f"gate {half}", {"gate": half}, 1.25, is_exact=False), Variant("no gate", {})]
    rows, stock = compare(f"gate, {steps} steps", pipe, run, variants, min(repeats, 3), same_picture)
    for gate in sorted({1, steps // 4, half, 3 * steps // 4, steps} - {0}):
        picture, milliseconds = timed(pipe, {"gate": gate}, run)
        print(f"  gate {gate} of {steps}: PSNR to stock {psnr(picture, stock):.1f} dB, {milliseconds:.0f} ms (one run)")
    return rows


def psnr(picture: Tensor, stock: Tensor) -> float:
    """Of pictures from 0 to 1, in dB; infinite for equal ones."""
    error = (picture.double() - stock.double()).square().mean().item()
    return math.inf if error == 0 else -10 * math.log10(error)


CASES: dict[str, Callable[[bool, int], list[Row]]] = {"sd": sd_case, "pixart": pixart_case, "gate": gate_case}


def main() -> int:
    """Print the table; exit code 1 when a row is short."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--case", choices=CASES, action="append", help="all of them by default")
    parser.add_argument("--size", choices=("full", "tiny"), default="full", help="tiny only shows that the script runs")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--json", type=Path, default=None, metavar="FILE")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    about = facts(mmattn, torch, diffusers, size=arguments.size, repeats=arguments.repeats)
    print(json.dumps(about))
    print(f"{'':<42} {'stock ms':>9} {'ours ms':>9} {'ratio':>7} {'goal':>6}")
    rows = [row for case in arguments.case or CASES for row in CASES[case](arguments.size == "tiny", arguments.repeats)]
    return finish(rows, about, arguments.json)


if __name__ == "__main__":
    sys.exit(main())
