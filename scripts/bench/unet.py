"""mmattn's U-Net beside stock diffusers' on Stable Diffusion 1.5's real configuration, alternating in one process.

    python scripts/bench/unet.py --threads 2 --json runs/unet.json

denoising  one step with guidance (two rows), no gradients; ours has the prompt's keys and values projected before, as
           every step of a generation but the first has
training   forward and backward of one row, gradients of all parameters

Random weights, float32, one set for both (`UNet.from_stock`). A row is the ratio of medians, stock's time by ours.
Below each: the largest difference of the outputs (or, training, of the gradients of any tensor) relative to stock's
largest, and where the forward's time goes. What is not attention is the same code in both, so that on a processor where
convolutions and feed-forward take most of the time there is little to win or lose.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from results import StepRow, facts, finish  # noqa: E402

import mmattn  # noqa: E402
from mmattn.ops.observe import AttentionCall, observing  # noqa: E402
from tests.swap.zoo_base import liven, seeded  # noqa: E402

GOAL = 0.98
LENGTH = 77  # tokens of a prompt
SD15: dict[str, Any] = {"cross_attention_dim": 768, "attention_head_dim": 8, "sample_size": 64}
TINY: dict[str, Any] = {"block_out_channels": (32, 64, 64, 64)}
PARTS = ("convolutions", "feed-forward", "norms", "projections", "self core", "cross core", "other")


@dataclass
class Row(StepRow):
    """One step beside stock's, and where the time goes."""

    stock_parts_ms: dict[str, float] = field(default_factory=dict)
    ours_parts_ms: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    """What is timed: `run(unet, text)` with each U-Net's own form of the text, and what it gives to be compared."""

    name: str
    run: Callable[[Any, Any], Any]
    compared: Callable[[Any, Any], dict[str, Tensor]]


def denoise(sample: Tensor, unet: Any, text: Any) -> Tensor:
    """A step with guidance."""
    with torch.no_grad():
        return unet(sample, 500, encoder_hidden_states=text).sample


def train(sample: Tensor, unet: Any, text: Any) -> None:
    """Forward and backward; the gradients stay in the parameters, which both U-Nets share."""
    unet.zero_grad(set_to_none=True)
    unet(sample, 500, encoder_hidden_states=text).sample.square().mean().backward()


def output_of(unet: Any, output: Tensor) -> dict[str, Tensor]:
    """The output, to be compared."""
    return {"output": output}


def gradients_of(unet: Any, _: Any) -> dict[str, Tensor]:
    """Each parameter's gradient, taken away from it."""
    gradients = {name: parameter.grad for name, parameter in unet.named_parameters() if parameter.grad is not None}
    unet.zero_grad(set_to_none=True)
    return gradients


def compare(step: Step, stock: tuple[Any, Any], ours: tuple[Any, Any], repeats: int) -> Row:
    """Time a step of both in turn, after one turn that is compared."""
    calls: list[AttentionCall] = []
    theirs = step.compared(stock[0], step.run(*stock))
    with observing(lambda call: calls.append(f"{call.role}: {call.backend}")):  # type: ignore[arg-type]
        found = step.compared(ours[0], step.run(*ours))
    difference = max(relative_difference(found[name], theirs[name]) for name in theirs)
    del theirs, found
    times: dict[str, list[float]] = {"stock": [], "ours": []}
    for _ in range(repeats):
        for name, given in (("stock", stock), ("ours", ours)):
            begin = time.perf_counter()
            step.run(*given)
            times[name].append(1000 * (time.perf_counter() - begin))
    middles = [statistics.median(times[name]) for name in ("stock", "ours")]
    spreads = [(max(spent) - min(spent)) / statistics.median(spent) for spent in times.values()]
    parts = [time_by_part(step, *given) for given in (stock, ours)]
    row = Row(step.name, middles[0] / middles[1], GOAL, *middles, *spreads, difference, sorted(set(calls)), *parts)
    show(row)
    return row


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference by the largest value."""
    largest = expected.abs().max().item()
    return (found - expected).abs().max().item() / largest if largest else found.abs().max().item()


def show(row: Row) -> None:
    """Print a row, and its time by part."""
    print(
        f"{row.name:<28} {row.stock_ms:>9.1f} {row.ours_ms:>9.1f} {row.value:>6.3f}x {row.goal:>5.2f}x  "
        f"{'ok' if row.is_ok else 'short':<5}  ±{50 * row.stock_spread:.0f}/{50 * row.ours_spread:.0f} %  "
        f"difference {row.difference:.1e}  {', '.join(row.backends)}"
    )
    for name, parts in (("stock", row.stock_parts_ms), ("ours", row.ours_parts_ms)):
        total = sum(parts.values())
        listed = ", ".join(f"{part} {parts[part]:.0f} ({parts[part] / total:.0%})" for part in PARTS)
        print(f"    {name + ', forward by part, ms':<28} {listed}", flush=True)


def time_by_part(step: Step, unet: nn.Module, text: Any) -> dict[str, float]:
    """Milliseconds of one forward by part, by torch.profiler over ranges set around the modules."""
    with ranges_around_parts(unet), profile(activities=[ProfilerActivity.CPU]) as profiler:
        step.run(unet, text)
    spent = {event.key: event.cpu_time_total / 1000 for event in profiler.key_averages()}
    parts = {part: spent.get(part, 0.0) for part in ("convolutions", "feed-forward", "norms")}
    linears = {kind: spent.get(f"{kind} projections", 0.0) for kind in ("self", "cross", "other")}
    parts["projections"] = sum(linears.values())
    for kind in ("self", "cross"):
        parts[f"{kind} core"] = spent[f"{kind} attention"] - linears[kind]
    # The range around the U-Net itself leaves a backward pass out.
    parts["other"] = spent["forward"] - sum(parts.values())
    return parts


def part_of(name: str, module: nn.Module) -> str | None:
    """The name of a module's range; nothing inside a feed-forward block has one of its own."""
    if ".ff." in name:
        return None
    if name.endswith(".ff"):
        return "feed-forward"
    if isinstance(module, nn.Conv2d):
        return "convolutions"
    if isinstance(module, nn.GroupNorm | nn.LayerNorm):
        return "norms"
    kind = "self" if ".attn1" in name else "cross" if ".attn2" in name else "other"
    if isinstance(module, nn.Linear):
        return f"{kind} projections"
    return f"{kind} attention" if name.endswith((".attn1", ".attn2")) else None


@contextmanager
def ranges_around_parts(unet: nn.Module) -> Iterator[None]:
    """Within the block, a profiler's range around each part's forward."""
    handles = []
    for name, module in unet.named_modules():
        part = "forward" if module is unet else part_of(name, module)
        if part is None:
            continue
        open_ranges: list[Any] = []

        def enter(*_: Any, part: str = part, open_ranges: list[Any] = open_ranges) -> None:
            open_ranges.append(record_function(part).__enter__())

        def leave(*_: Any, open_ranges: list[Any] = open_ranges) -> None:
            open_ranges.pop().__exit__(None, None, None)

        handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def run_sizes(config: dict[str, Any], sides: list[int], repeats: int) -> list[Row]:
    """Both steps at each size of the latents."""
    stock = seeded(lambda: liven(UNet2DConditionModel(**config)))()
    ours = mmattn.UNet.from_stock(stock)
    millions = sum(parameter.numel() for parameter in stock.parameters()) / 1e6
    print(f"{millions:.0f} M parameters")
    print(f"{'':<28} {'stock ms':>9} {'ours ms':>9} {'ratio':>7} {'goal':>6}")
    generator = torch.Generator().manual_seed(1)
    text = torch.randn(2, LENGTH, config["cross_attention_dim"], generator=generator)
    with torch.no_grad():
        begin = time.perf_counter()
        context = ours.project_context(text)
        once = 1000 * (time.perf_counter() - begin)
    rows = []
    for side in sides:
        sample = torch.randn(2, 4, side, side, generator=generator)
        step = Step(f"denoising, {side} x {side}", functools.partial(denoise, sample), output_of)
        rows.append(compare(step, (stock, text), (ours, context), repeats))
        step = Step(f"training, {side} x {side}", functools.partial(train, sample[:1]), gradients_of)
        rows.append(compare(step, (stock, text[:1]), (ours, text[:1]), repeats))
        stock.zero_grad(set_to_none=True)
    print(f"the prompt's keys and values, once per generation: {once:.1f} ms, {context.nbytes / 2**20:.0f} MiB")
    return rows


def main() -> int:
    """Print the table; exit code 1 when a row is short."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="32 x 32 latents only")
    parser.add_argument("--size", choices=("full", "tiny"), default="full", help="tiny only shows that the script runs")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--json", type=Path, default=None, metavar="FILE")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    about = facts(mmattn, torch, diffusers, size=arguments.size, repeats=arguments.repeats)
    print(json.dumps(about))
    config = SD15 | TINY if arguments.size == "tiny" else SD15
    rows = run_sizes(config, [32] if arguments.quick else [64, 32], arguments.repeats)
    return finish(rows, about, arguments.json)


if __name__ == "__main__":
    sys.exit(main())
