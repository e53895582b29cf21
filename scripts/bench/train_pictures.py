"""Training steps of the picture models beside stock's, alternating in one process.

    python scripts/bench/train_pictures.py --threads 2 --json runs/train_pictures.json

vlm    BLIP captioning at its real size (a ViT-B/16 at 384 pixels, a text decoder of 12 layers), random weights, beside
       transformers' `BlipForConditionalGeneration`. Stock's step is that of the usual fine-tuning scripts: pictures
       through the image encoder in every step, captions padded to the longest with their mask, labels of -100 at the
       padding, each caption with a picture of its own. Ours is the recipe `vlm`, as `mmattn train` sets it up: packed
       texts, the features of a frozen image encoder from its cache, several captions of a picture on one pass of it.
unet   `scripts/bench/unet.py`'s training row: Stable Diffusion 1.5's U-Net, forward and backward.

The same weights, pictures, captions and scored tokens in both; float32; whole steps: forward, backward, norm of the
gradient, AdamW (fused; the U-Net without the last two). Pictures are opened before. Ours runs as `mmattn train` does
on a CPU, with freed memory kept for the next step (`mmattn.training.kept_memory`), stock as a script of its own would;
what stock takes when it is given that too stands beside it (`stock_kept_ms`). A turn is one step that is not timed and
one that is. Every row has a process of its own: what earlier rows have left in the heap would serve stock, too, and it
would find the memory that a script has to ask the system for. `faults` counts the pages that each had to ask for in its
last timed step. A row is the ratio of medians, stock's by ours; `difference` is that of the first losses (U-Net: of any
gradient), relative.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from results import StepRow, facts, finish
from torch import nn
from transformers import BlipForConditionalGeneration
from unet import LENGTH, SD15, TINY, gradients_of, liven, relative_difference, seeded, train
from vlm_inference import observed_backends, pictures, save_random

import mmattn
from mmattn.config import load_config, load_recipe
from mmattn.inference.vlm_setup import make_collator
from mmattn.training.gradients import clip_whole_gradients
from mmattn.training.kept_memory import kept_memory

VLM_GOAL, UNET_GOAL = 1.2, 1.0
MEAN_WORDS, SPREAD = 11.0, 0.3  # of a caption's length, lognormal: that of COCO's
LEARNING_RATE = 1e-5


@dataclass
class Row(StepRow):
    """One step beside stock's, and what was in it."""

    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """What is trained, on how many pictures and captions a step."""

    name: str
    train_what: str
    pictures: int
    captions: int = 1


CASES = [
    Case("vlm, everything trained", "all", 4),
    Case("vlm, image encoder frozen", "cross_attention", 4),
    Case("vlm, everything trained, 5 captions a picture", "all", 1, captions=5),
]


def write_data(folder: Path, case: Case, vocab_size: int) -> None:
    """Picture files, and captions of random words."""
    random = np.random.default_rng(0)
    rows = []
    for number, picture in enumerate(pictures(case.pictures)):
        picture.save(folder / f"{number}.png")
        sizes = np.rint(random.lognormal(np.log(MEAN_WORDS), SPREAD, case.captions)).astype(int).clip(3, 40)
        texts = [" ".join(f"word{word}" for word in random.integers(10, vocab_size - 10, size)) for size in sizes]
        rows.append({"image": f"{number}.png", "text": texts})
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


def make_task(folder: Path, case: Case) -> Any:
    """The recipe's task on the folder's model, pictures and captions."""
    recipe = load_recipe("vlm")
    settings = {
        "data.path": folder / "captions.jsonl",
        "training.eval_every": 0,  # there is nothing to score
        "data.eval_fraction": 0,
        "model.from_pretrained": folder / "blip",
        "train_what": case.train_what,
        "examples.texts_per_image": case.captions,
        "training.output_dir": folder / "run",
        "training.batch_size": case.pictures,
        "training.micro_batch_size": "null",
    }
    overrides = [f"{key}={value}" for key, value in settings.items()]
    return recipe.VLMTask(load_config(recipe.Config, "vlm/finetune-blip", overrides))


def stock_batch(task: Any, case: Case) -> dict[str, torch.Tensor]:
    """The same captions padded, each with a picture of its own."""
    examples = replace(task.config.examples, packing=False)
    batch = make_collator(task.vlm, examples, task.config.training.seed)(task.source, draws(case))
    return batch | {"pixel_values": batch["pixel_values"].repeat_interleave(case.captions, dim=0)}


def draws(case: Case) -> list[tuple[int, int]]:
    """All pictures once."""
    return [(0, number) for number in range(case.pictures)]


def whole_step(
    model: nn.Module,
    mean_loss: Callable[[], torch.Tensor],
    clip: Callable[..., Any] = torch.nn.utils.clip_grad_norm_,
) -> Callable[[], float]:
    """A step of AdamW on what has `requires_grad`; gives the loss."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, fused=True)

    def step() -> float:
        optimizer.zero_grad()
        loss = mean_loss()
        loss.backward()
        clip(trained, 1.0)
        optimizer.step()
        return loss.item()

    return step


def vlm_row(case: Case, size: str, repeats: int) -> Row:
    """One case of BLIP captioning."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_random(BlipForConditionalGeneration, folder / "blip", size)
        stock: Any = BlipForConditionalGeneration.from_pretrained(folder / "blip").train()
        write_data(folder, case, stock.config.text_config.vocab_size)
        begin = time.perf_counter()
        task = make_task(folder, case)
        opened = time.perf_counter() - begin
        batch = task.collate(draws(case))
        padded = stock_batch(task, case)
    if case.train_what == "cross_attention":
        for name, parameter in stock.named_parameters():
            parameter.requires_grad_(".crossattention." in name)
    trained = [sum(p.numel() for p in model.parameters() if p.requires_grad) for model in (stock, task.model)]
    if trained[0] != trained[1]:
        raise RuntimeError(f"stock trains {trained[0]} parameters, ours {trained[1]}")
    network = task.model.train()

    def mean_loss() -> torch.Tensor:
        loss = task.loss(network, batch)
        return loss.total / loss.count

    steps = {
        "stock": whole_step(stock, lambda: stock(**padded).loss),
        "ours": whole_step(network, mean_loss, clip_whole_gradients),
    }
    first = {kind: step() for kind, step in steps.items()}
    difference = abs(first["ours"] - first["stock"]) / abs(first["stock"])
    with observed_backends() as backends, torch.no_grad():  # packed calls show nothing
        network(padded["pixel_values"][:1], padded["input_ids"][:1])
    slots, tokens = padded["input_ids"].numel(), int(padded["attention_mask"].sum())
    facts = {"padded": slots, "tokens": tokens, "scored": task.count(batch), "opening_s": round(opened, 1)}
    return timed(case.name, steps, difference, repeats, sorted(backends), VLM_GOAL, facts)


def timed(
    name: str,
    steps: dict[str, Callable[[], Any]],
    difference: float,
    repeats: int,
    backends: list[str],
    goal: float,
    facts: dict[str, Any],
) -> Row:
    """Time both in turn, and stock's with memory kept as ours is."""
    turns = {"stock": (steps["stock"], False), "ours": (steps["ours"], True), "stock, kept": (steps["stock"], True)}
    times: dict[str, list[float]] = {kind: [] for kind in turns}
    faults = {}
    for _ in range(repeats):
        for kind, (step, is_kept) in turns.items():
            with kept_memory(torch.device("cpu")) if is_kept else nullcontext():
                step()
                before, begin = _faults(), time.perf_counter()
                step()
                times[kind].append(1000 * (time.perf_counter() - begin))
                faults[kind] = _faults() - before
    stock, ours, alike = (statistics.median(times[kind]) for kind in turns)
    spreads = [(max(times[kind]) - min(times[kind])) / statistics.median(times[kind]) for kind in ("stock", "ours")]
    facts = {**facts, "stock_kept_ms": round(alike, 1), "ratio_both_kept": round(alike / ours, 3), "faults": faults}
    row = Row(name, stock / ours, goal, stock, ours, *spreads, difference, backends, facts)
    show(row)
    return row


def _faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def show(row: Row) -> None:
    """Print a row."""
    print(
        f"{row.name:<48} {row.stock_ms:>9.1f} {row.ours_ms:>9.1f} {row.value:>6.2f}x {row.goal:>5.2f}x  "
        f"{'ok' if row.is_ok else 'short':<5}  ±{50 * row.stock_spread:.0f}/{50 * row.ours_spread:.0f} %  "
        f"difference {row.difference:.1e}  {', '.join(row.backends)}  {row.facts or ''}",
        flush=True,
    )


def unet_row(size: str, side: int, repeats: int) -> Row:
    """The U-Net's training step."""
    config = SD15 | TINY if size == "tiny" else SD15
    stock = seeded(lambda: liven(UNet2DConditionModel(**config)))()
    ours = mmattn.UNet.from_stock(stock)
    generator = torch.Generator().manual_seed(1)
    text = torch.randn(1, LENGTH, config["cross_attention_dim"], generator=generator)
    sample = torch.randn(1, 4, side, side, generator=generator)
    theirs = gradients_of(stock, train(sample, stock, text))
    with observed_backends() as backends:
        found = gradients_of(ours, train(sample, ours, text))
    difference = max(relative_difference(found[name], theirs[name]) for name in theirs)
    del theirs, found
    steps: dict[str, Callable[[], Any]] = {
        "stock": functools.partial(train, sample, stock, text),
        "ours": functools.partial(train, sample, ours, text),
    }
    return timed(f"unet, training, {side} x {side}", steps, difference, repeats, sorted(backends), UNET_GOAL, {})


def all_rows(size: str, repeats: int, *, is_quick: bool = False) -> list[Row]:
    """Every row; quick leaves out the case of several captions, and the larger latents."""
    print(f"{'':<48} {'stock ms':>9} {'ours ms':>9} {'ratio':>7} {'goal':>6}", flush=True)
    rows: list[Callable[[], Row]] = [
        *(functools.partial(vlm_row, case, size, repeats) for case in (CASES[:2] if is_quick else CASES)),
        *(functools.partial(unet_row, size, side, repeats) for side in ([32] if is_quick else [64, 32])),
    ]
    return [_in_a_process_of_its_own(row) for row in rows]


def _in_a_process_of_its_own(row: Callable[[], Row]) -> Row:
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, initializer=_begin, initargs=(torch.get_num_threads(),)) as pool:
        return pool.submit(row).result()


def _begin(threads: int) -> None:
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()


def main() -> int:
    """Print the table; exit code 1 when a row is short."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two cases of the vlm, and 32 x 32 latents only")
    parser.add_argument("--size", choices=("full", "tiny"), default="full", help="tiny only shows that the script runs")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--json", type=Path, default=None, metavar="FILE")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    about = facts(mmattn, torch, transformers, diffusers, size=arguments.size, repeats=arguments.repeats)
    print(json.dumps(about))
    return finish(all_rows(arguments.size, arguments.repeats, is_quick=arguments.quick), about, arguments.json)


if __name__ == "__main__":
    sys.exit(main())
