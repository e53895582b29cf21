"""What recording costs beside cross-attention itself: time at Stable Diffusion's shapes and for long keys, and memory.

    python scripts/bench/maps.py [--rounds 7] [--json FILE] [--package FOLDER]

A row's layers run in turn, so that a busy machine slows all alike: as they are (fused), with ten words of the prompt
recorded, eagerly with the same words kept, and with them captured by the package attention-map-diffusers in its two
modes, "exact" (maps within the call) and "fast" (queries and keys are kept, and maps computed from them, which counts).
The package is looked for where Python finds it and in `--package`, a folder that `pip install --target FOLDER --no-deps
attention-map-diffusers` has filled; a row says why it has no figure of it. Memory is that of a whole U-Net at 64 x 64
latents: the process's peak with recording less that without, each in a process of its own, medians of five in turn
(one differs from the next by up to 90 MiB).
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn

from mmattn.maps.record import record_attention

WORDS = 10
_MEMORY_ROUNDS = 5
KEPT = list(range(1, WORDS + 1))
# Queries, channels, heads and keys: the layers of SD 1.5 at 64 x 64 latents, then long texts.
SHAPES = {
    "sd15 64x64": (4096, 320, 8, 77),
    "sd15 32x32": (1024, 640, 8, 77),
    "sd15 16x16": (256, 1280, 8, 77),
    "512 keys": (1024, 640, 8, 512),
    "1024 keys": (1024, 640, 8, 1024),
}
SD15: Any = {"cross_attention_dim": 768, "attention_head_dim": 8, "sample_size": 64}


class Layers(UNet2DConditionModel):
    """One cross-attention, called as a U-Net's is, and recorded as one."""

    def __init__(self, channels: int, heads: int) -> None:
        nn.Module.__init__(self)
        self.register_to_config(in_channels=channels)
        self.attn2 = Attention(channels, cross_attention_dim=768, heads=heads, dim_head=channels // heads)

    def forward(self, sample: Tensor, timestep: float, text: Tensor) -> Tensor:  # pyright: ignore
        """Places `[B, C, rows, columns]` and text `[B, Lk, 768]`."""
        return self.attn2(sample.flatten(2).transpose(1, 2), encoder_hidden_states=text)


class EagerKept:
    """The processor that people write for maps: weights in full, and the words cut out of them."""

    def __init__(self) -> None:
        self.kept: Tensor | None = None

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, **_: Any) -> Tensor:
        """As diffusers' `AttnProcessor`."""
        query, key, value = (
            attn.head_to_batch_dim(project(states))
            for project, states in (
                (attn.to_q, hidden_states),
                (attn.to_k, encoder_hidden_states),
                (attn.to_v, encoder_hidden_states),
            )
        )
        weights = attn.get_attention_scores(query, key, None)
        self.kept = weights.unflatten(0, (-1, attn.heads)).mean(1)[..., KEPT]
        return attn.to_out[1](attn.to_out[0](attn.batch_to_head_dim(weights @ value)))


class Package:
    """What attention-map-diffusers captures of a layer, or why it captures nothing."""

    def __init__(self) -> None:
        self.problem = ""
        try:
            from attention_map_diffusers import AttentionCapture  # pyright: ignore[reportMissingImports]
        except Exception as error:  # whatever it says in these versions of diffusers and torch
            self.problem = f"attention-map-diffusers: {type(error).__name__}: {error}"
            return
        self._capture = AttentionCapture

    def seconds(self, mode: str, model: nn.Module, sample: Tensor, text: Tensor) -> float | None:
        """Of one call with its maps, the best of five; None where it fails, with the reason."""
        settings = {"key_indices": KEPT, "heads": "mean", "timesteps": "all", "mode": mode}
        best = float("inf")
        try:
            for step in range(5):
                with self._capture(SimpleNamespace(unet=model), **settings) as captured:
                    begun = time.perf_counter()
                    model(sample, 1.0 - 0.1 * step, text)
                    found = captured.compute().records
                    best = min(best, time.perf_counter() - begun)
                if sorted(found[0].data.shape)[-1] != sample.shape[2] * sample.shape[3]:
                    raise ValueError(f"maps of shape {list(found[0].data.shape)}")
        except Exception as error:
            self.problem = f"attention-map-diffusers, {mode}: {type(error).__name__}: {error}"
            return None
        return best


@torch.no_grad()
def timed_row(name: str, rounds: int, package: Package) -> dict[str, Any]:
    """Milliseconds of one layer in every way."""
    length, channels, heads, num_keys = SHAPES[name]
    model, side = Layers(channels, heads).eval(), int(length**0.5)
    draw = torch.Generator().manual_seed(0)
    sample = torch.randn(1, channels, side, side, generator=draw)
    text = torch.randn(1, num_keys, 768, generator=draw)
    stock = model.attn2.processor
    times: dict[str, list[float]] = {"fused": [], "recorded": [], "eager": []}
    for round_number in range(rounds + 1):
        found = {"fused": seconds(model, sample, text)}
        with record_attention(model, tokens=KEPT):
            model(sample, 1.0, text)
            found["recorded"] = seconds(model, sample, text)
        eager: Any = EagerKept()
        model.attn2.set_processor(eager)
        found["eager"] = seconds(model, sample, text)
        model.attn2.set_processor(stock)
        for mode in () if package.problem else ("exact", "fast"):
            value = package.seconds(mode, model, sample, text)
            found |= {} if value is None else {f"package {mode}": value}
        if round_number:
            for way, value in found.items():
                times.setdefault(way, []).append(value)
    row = {way: 1e3 * median(values) for way, values in times.items()}
    ratios = {f"{way}/fused": row[way] / row["fused"] for way in row if way != "fused"}
    return {"row": name, **row, **ratios} | ({"package": package.problem} if package.problem else {})


def seconds(model: nn.Module, sample: Tensor, text: Tensor) -> float:
    """Of one call, the best of five steps of one generation."""
    best = float("inf")
    for step in range(5):
        begun = time.perf_counter()
        model(sample, 1.0 - 0.1 * (step + 1), text)
        best = min(best, time.perf_counter() - begun)
    return best


@torch.no_grad()
def peak_of(way: str) -> float:
    """Peak memory of two U-Net steps in this process, MiB."""
    torch.manual_seed(0)
    model = UNet2DConditionModel(**SD15).eval()
    sample, text = torch.randn(1, 4, 64, 64), torch.randn(1, 77, 768)
    model(sample, 3, text)
    if way == "fused":
        for step in (2, 1):
            model(sample, step, text)
    else:
        with record_attention(model, tokens=KEPT):
            for step in (2, 1):
                model(sample, step, text)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def memory() -> dict[str, Any]:
    """Peaks of both ways, each in processes of its own, in turn."""
    peaks: dict[str, list[float]] = {"fused": [], "recorded": []}
    for _ in range(_MEMORY_ROUNDS):
        for way, found in peaks.items():
            command = [sys.executable, __file__, "--peak", way]
            found.append(float(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    means = {way: median(found) for way, found in peaks.items()}
    return {"row": "memory, 64x64 latents (MiB)", **means, "more": means["recorded"] - means["fused"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--package", type=Path, help="folder that holds attention-map-diffusers")
    parser.add_argument("--rows", nargs="*", default=[*SHAPES, "memory"])
    parser.add_argument("--peak", choices=["fused", "recorded"], help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.peak:
        print(peak_of(given.peak))
        return
    if given.package:
        sys.path.append(str(given.package))
    package, rows = Package(), []
    for name in given.rows:
        row = memory() if name == "memory" else timed_row(name, given.rounds, package)
        shown = (f"{key} {value:.2f}" if isinstance(value, float) else f"{value:28}" for key, value in row.items())
        print("  ".join(shown), flush=True)
        rows.append(row)
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
