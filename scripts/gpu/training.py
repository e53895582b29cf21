"""Each recipe by `accelerate launch` in bfloat16: 200 steps, killed on the way and resumed; speed, MFU, memory.

Models of 100 million parameters or more with random weights, on drawn scenes. What counts is the second half, after the
resume: medians over its steps, without the first ten.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from measure import ROOT, Options, read_options

sys.path.insert(0, str(ROOT / "scripts" / "accept"))
from kill_resume import kill, last_step

SIZES: dict[str, list[str]] = {
    "translate": [
        *["data.size=20000", "data.eval_size=20", "training.batch_tokens=32768", "examples.guided_alignment_weight=0"],
        *[f"model.network.{side}_layers=6" for side in ("encoder", "decoder")],
        *[f"model.network.{side}_heads=16" for side in ("encoder", "decoder")],
        *[f"model.network.{side}_ffn_dim=4096" for side in ("encoder", "decoder")],
        *["model.network.embed_dim=1024"],
    ],
    "vlm": [
        *["data.size=20000", "data.image_size=224", "training.batch_size=128", "model.network.image.kind=vit"],
        *["model.network.image.image_size=224", "model.network.image.patch_size=16", "examples.texts_per_image=4"],
        *[f"model.network.{part}.embed_dim=1024" for part in ("image", "text")],
        *["model.network.image.num_layers=12", "model.network.text.num_layers=4"],
        *[f"model.network.{part}.num_heads=16" for part in ("image", "text")],
        *[f"model.network.{part}.ffn_dim=4096" for part in ("image", "text")],
    ],
    "diffusion": [
        *["data.size=20000", "data.image_size=64", "model.image_size=64", "pictures.resolution=64"],
        *["model.pixel_unshuffle=2", "training.batch_size=128", "training.ema_decay=null"],
        *["model.unet.block_out_channels=[256,512,512]", "model.unet.attention=[false,true,true]"],
        *["model.unet.layers_per_block=2", "model.unet.num_heads=8", "model.unet.norm_groups=32"],
        *["model.text_encoder.width=512", "model.text_encoder.num_layers=4", "model.text_encoder.num_heads=8"],
    ],
}
STEPS, TINY_STEPS = 200, 24
# For both halves of one recipe, on a card; a machine just started takes 30 s to import the libraries.
LIMIT_S = 160.0


def launch(
    recipe: str, folder: Path, steps: int, options: Options, *, resume: bool = False, is_compiled: bool = False
) -> subprocess.Popen[bytes]:
    """The recipe's script under `accelerate launch`, its output in a file beside the folder."""
    # bf16 is many times slower than float32 on most CPUs.
    precision = "bf16" if options.device == "cuda" else "no"
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes=1", "--num_machines=1"]
    launcher += [
        f"--mixed_precision={precision}",
        "--dynamo_backend=no",
        *(["--cpu"] if options.device == "cpu" else []),
    ]
    settings = {
        "torch_compile": is_compiled,
        **({} if options.tiny else {"learning_rate": 2e-4}),
        "output_dir": folder,
        "max_steps": steps,
        "save_every": max(1, steps // 2),
        "log_every": max(1, steps // 10),
        "eval_every": 0,
        "num_workers": 0 if options.tiny else max(2, (os.cpu_count() or 4) - 2),
    }
    overrides = [] if options.tiny else SIZES[recipe]
    arguments = [*overrides, *(f"training.{key}={value}" for key, value in settings.items())]
    with open(folder.with_suffix(".log"), "ab") as log:
        return subprocess.Popen(
            [*launcher, f"recipes/{recipe}.py", "--config", f"{recipe}/debug", *arguments, *["--resume"] * resume],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )


def run(process: subprocess.Popen[bytes], folder: Path, end: float, kill_at: int | None) -> int | None:
    """To its end, or until `kill_at` steps are done, and then killed: the exit code, None when it was killed.

    Raises:
        TimeoutError: not done at the time `end`.
    """
    try:
        while (code := process.poll()) is None:
            if kill_at is not None and last_step(folder) >= kill_at:
                return None
            if time.monotonic() > end:
                raise TimeoutError("not done in time")
            time.sleep(0.05)
        return code
    finally:
        kill(process)


def tail(folder: Path) -> str:
    """The last line that a run has said."""
    lines = folder.with_suffix(".log").read_text(encoding="utf-8", errors="replace").splitlines()
    return next((line for line in reversed(lines) if line.startswith("mmattn:")), lines[-1] if lines else "nothing")


def measured(recipe: str, folder: Path, steps: int, options: Options) -> dict[str, Any]:
    """Kill a run in its second half, resume it, and read the figures of the table."""
    limit, kill_at = LIMIT_S if options.device == "cuda" else 900.0, steps * 5 // 8
    end = time.monotonic() + limit
    if run(launch(recipe, folder, steps, options), folder, end, kill_at) is not None:
        raise RuntimeError(f"ended before it could be killed: {tail(folder)}")
    if (code := run(launch(recipe, folder, steps, options, resume=True), folder, end, None)) != 0:
        raise RuntimeError(f"exit code {code} when resumed: {tail(folder)}")
    resumed_at = int(re.findall(r"resumed from \S*step-(\d+)", said(folder))[-1])
    first = resumed_at + (10 if not options.tiny else 1)
    return {"killed at": kill_at, "resumed from": resumed_at, **figures(folder, steps, first, options)}


def said(folder: Path) -> str:
    """All that a run has written to the terminal."""
    return folder.with_suffix(".log").read_text(encoding="utf-8", errors="replace")


def figures(folder: Path, steps: int, first: int, options: Options) -> dict[str, Any]:
    """Cells of a run's row: medians over the steps after `first`.

    Raises:
        RuntimeError: a step is missing or done twice, a loss is not finite, or the run was not in bf16 on a card.
    """
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    trained = [line for line in lines if line["kind"] == "train"]
    if [line["step"] for line in trained] != list(range(1, steps + 1)):
        raise RuntimeError(f"{len(trained)} of {steps} steps in metrics.jsonl, or not in order")
    if not all(math.isfinite(line["loss"]) for line in trained):
        raise RuntimeError("a loss that is not finite")
    if options.device == "cuda" and "precision bf16" not in said(folder):
        raise RuntimeError("not in bf16, for which the launcher asked")
    number = re.findall(r"training ([\d,]+) of [\d,]+ parameters", said(folder))[-1]
    clocks = [line["time"] for line in trained if line["step"] > first]

    def median(read: Any) -> float:
        return statistics.median(read(clock) for clock in clocks)

    return {
        "parameters": f"{int(number.replace(',', '')) / 1e6:.1f} M",
        "loss, first and last": f"{trained[0]['loss']:.3f}, {trained[-1]['loss']:.3f}",
        "ms a step": f"{1000 * median(lambda clock: clock['step_s']):.0f}",
        "units/s": f"{median(lambda clock: clock['tokens_per_s']):,.0f}",
        "waiting for data": f"{median(lambda clock: clock['data_s'] / clock['step_s']):.0%}",
        "MFU": f"{100 * median(lambda clock: clock['mfu']):.1f}%" if "mfu" in clocks[-1] else "-",
        "peak memory": f"{clocks[-1]['peak_memory_bytes'] / 2**30:.1f} GiB",
    }


def rows(table: str, row: Callable[[str, Path], dict[str, Any]], options: Options) -> int:
    """A row for each recipe; one that fails costs its own row only. The exit status."""
    failed = False
    with tempfile.TemporaryDirectory() as name:
        for recipe in SIZES:
            folder = Path(name) / recipe
            try:
                cells = row(recipe, folder)
            except (RuntimeError, TimeoutError, OSError) as error:
                failed = True
                print(f"{recipe}: {error}", flush=True)
                with contextlib.suppress(OSError):
                    print(said(folder)[-3000:], flush=True)
                continue
            options.add(table, recipe=recipe, **cells)
    return 1 if failed else 0


def main() -> int:
    """The table."""
    options = read_options(__doc__)
    steps = TINY_STEPS if options.tiny else STEPS
    precision = "bf16" if options.device == "cuda" else "float32"
    table = f"Training by accelerate launch, {precision}, {steps} steps"
    return rows(table, lambda recipe, folder: measured(recipe, folder, steps, options), options)


if __name__ == "__main__":
    sys.exit(main())
