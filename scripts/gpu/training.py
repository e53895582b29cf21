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
from pathlib import Path
from typing import Any

from measure import ROOT, Options, read_options

sys.path.insert(0, str(ROOT / "scripts" / "accept"))
from kill_resume import kill, last_step

SIZES: dict[str, list[str]] = {
    "translate": [
        *["data.size=30000", "data.eval_size=20", "training.batch_tokens=65536", "examples.guided_alignment_weight=0"],
        *[f"model.network.{side}_layers=6" for side in ("encoder", "decoder")],
        *[f"model.network.{side}_heads=16" for side in ("encoder", "decoder")],
        *[f"model.network.{side}_ffn_dim=4096" for side in ("encoder", "decoder")],
        *["model.network.embed_dim=1024"],
    ],
    "vlm": [
        *["data.size=20000", "data.image_size=224", "training.batch_size=128", "model.network.image.kind=vit"],
        *["model.network.image.image_size=224", "model.network.image.patch_size=16", "examples.texts_per_image=4"],
        *[f"model.network.{part}.embed_dim=1024" for part in ("image", "text")],
        *["model.network.image.num_layers=24", "model.network.text.num_layers=6"],
        *[f"model.network.{part}.num_heads=16" for part in ("image", "text")],
        *[f"model.network.{part}.ffn_dim=4096" for part in ("image", "text")],
    ],
    "diffusion": [
        *["data.size=20000", "data.image_size=64", "model.image_size=64", "pictures.resolution=64"],
        *["model.pixel_unshuffle=2", "training.batch_size=256", "training.ema_decay=null"],
        *["model.unet.block_out_channels=[256,512,768]", "model.unet.attention=[false,true,true]"],
        *["model.unet.layers_per_block=2", "model.unet.num_heads=8", "model.unet.norm_groups=32"],
        *["model.text_encoder.width=512", "model.text_encoder.num_layers=4", "model.text_encoder.num_heads=8"],
    ],
}
STEPS, TINY_STEPS = 200, 24
LIMIT_S = 150.0  # for both halves of one recipe, on a card


def launch(recipe: str, folder: Path, steps: int, options: Options, *, resume: bool) -> subprocess.Popen[bytes]:
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
        **({} if options.tiny else {"torch_compile": True, "learning_rate": 2e-4}),
        "output_dir": folder,
        "max_steps": steps,
        "save_every": steps // 2,
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
    if run(launch(recipe, folder, steps, options, resume=False), folder, end, kill_at) is not None:
        raise RuntimeError(f"ended before it could be killed: {tail(folder)}")
    if (code := run(launch(recipe, folder, steps, options, resume=True), folder, end, None)) != 0:
        raise RuntimeError(f"exit code {code} when resumed: {tail(folder)}")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    trained = [line for line in lines if line["kind"] == "train"]
    if [line["step"] for line in trained] != list(range(1, steps + 1)):
        raise RuntimeError(f"{len(trained)} of {steps} steps in metrics.jsonl, or not in order")
    if not all(math.isfinite(line["loss"]) for line in trained):
        raise RuntimeError("a loss that is not finite")
    said = folder.with_suffix(".log").read_text(encoding="utf-8", errors="replace")
    if options.device == "cuda" and "precision bf16" not in said:
        raise RuntimeError("not in bf16, for which the launcher asked")
    resumed_at = int(re.findall(r"resumed from \S*step-(\d+)", said)[-1])
    number = re.findall(r"training ([\d,]+) of [\d,]+ parameters", said)[-1]
    clocks = [line["time"] for line in trained if line["step"] > resumed_at + (10 if not options.tiny else 1)]

    def median(read: Any) -> float:
        return statistics.median(read(clock) for clock in clocks)

    return {
        "parameters": f"{int(number.replace(',', '')) / 1e6:.1f} M",
        "killed at": kill_at,
        "resumed from": resumed_at,
        "loss, first and last": f"{trained[0]['loss']:.3f}, {trained[-1]['loss']:.3f}",
        "ms a step": f"{1000 * median(lambda clock: clock['step_s']):.0f}",
        "units/s": f"{median(lambda clock: clock['tokens_per_s']):,.0f}",
        "waiting for data": f"{median(lambda clock: clock['data_s'] / clock['step_s']):.0%}",
        "MFU": f"{100 * median(lambda clock: clock['mfu']):.1f}%" if "mfu" in clocks[-1] else "-",
        "peak memory": f"{clocks[-1]['peak_memory_bytes'] / 2**30:.1f} GiB",
    }


def main() -> int:
    """A row for each recipe; one that fails costs its own row only."""
    options = read_options(__doc__)
    steps, failed = TINY_STEPS if options.tiny else STEPS, False
    with tempfile.TemporaryDirectory() as name:
        for recipe in SIZES:
            folder = Path(name) / recipe
            try:
                cells = measured(recipe, folder, steps, options)
            except (RuntimeError, TimeoutError, OSError) as error:
                failed = True
                print(f"{recipe}: {error}", flush=True)
                with contextlib.suppress(OSError):
                    print(folder.with_suffix(".log").read_text(encoding="utf-8", errors="replace")[-3000:], flush=True)
                continue
            precision = "bf16" if options.device == "cuda" else "float32"
            options.add(f"Training by accelerate launch, {precision}, {steps} steps", recipe=recipe, **cells)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
