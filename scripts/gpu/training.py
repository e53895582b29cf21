"""Each recipe by `accelerate launch` in bfloat16: 200 steps, killed on the way and resumed; speed, MFU, memory.

Models of 100 million parameters or more with random weights, on drawn scenes. What counts is the second half, after the
resume: medians over its steps, without the first ten or so, while nothing else runs.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from measure import ROOT, Options, read_options
from processes import freeze, thaw, usable_cores
from side_by_side import OUT_OF_TIME

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
        *["data.size=20000", "data.image_size=224", "training.batch_size=256", "model.network.image.kind=vit"],
        *["model.network.image.image_size=224", "model.network.image.patch_size=16", "examples.texts_per_image=4"],
        *[f"model.network.{part}.embed_dim=1024" for part in ("image", "text")],
        *["model.network.image.num_layers=12", "model.network.text.num_layers=4"],
        *[f"model.network.{part}.num_heads=16" for part in ("image", "text")],
        *[f"model.network.{part}.ffn_dim=4096" for part in ("image", "text")],
    ],
    "diffusion": [
        *["data.size=20000", "data.image_size=64", "model.image_size=64", "pictures.resolution=64"],
        *["model.pixel_unshuffle=2", "training.batch_size=512", "training.ema_decay=null"],
        *["model.unet.block_out_channels=[256,512,512]", "model.unet.attention=[false,true,true]"],
        *["model.unet.layers_per_block=2", "model.unet.num_heads=8", "model.unet.norm_groups=32"],
        *["model.text_encoder.width=512", "model.text_encoder.num_layers=4", "model.text_encoder.num_heads=8"],
    ],
}
STEPS, TINY_STEPS = 200, 24
# For both halves of one recipe, on a card, while it may run.
LIMIT_S = 290.0
LIMIT_ON_CPU_S = 900.0
# Enough for a card that takes a batch in 60 ms; more take as long to start as a machine has cores.
DATA_WORKERS = {"translate": 8, "vlm": 12, "diffusion": 12}
UNCOUNTED, TINY_UNCOUNTED = 10, 1
_POLL_S = 0.05


def launch(
    recipe: str, folder: Path, steps: int, options: Options, *, resume: bool = False, **training: Any
) -> subprocess.Popen[bytes]:
    """The recipe's script under `accelerate launch` with some settings of `training`, its output in a file beside the
    folder."""
    # bf16 is many times slower than float32 on most CPUs.
    precision = "bf16" if options.device == "cuda" else "no"
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes=1", "--num_machines=1"]
    launcher += [
        f"--mixed_precision={precision}",
        "--dynamo_backend=no",
        *(["--cpu"] if options.device == "cpu" else []),
    ]
    arguments = ["--config", f"{recipe}/debug", *overrides(recipe, folder, steps, options, **training)]
    with open(folder.with_suffix(".log"), "ab") as log:
        return subprocess.Popen(
            [*launcher, f"recipes/{recipe}.py", *arguments, *["--resume"] * resume],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )


def overrides(recipe: str, folder: Path, steps: int, options: Options, **training: Any) -> list[str]:
    """What a run changes of its recipe's debug config, as `key.path=value`."""
    settings = {
        **({} if options.tiny else {"learning_rate": 2e-4}),
        "output_dir": folder,
        "max_steps": steps,
        "log_every": max(1, steps // 10),
        "eval_every": 0,
        "num_workers": 0 if options.tiny else min(DATA_WORKERS[recipe], max(2, usable_cores() - 2)),
        **training,
    }
    sizes = [] if options.tiny else SIZES[recipe]
    return [*sizes, *(f"training.{key}={value}" for key, value in settings.items())]


class Clock:
    """How long this process has run; while it is stopped (see `side_by_side`) little is counted."""

    def __init__(self, limit: float) -> None:
        self.left, self._before = limit, time.monotonic()

    def tick(self) -> None:
        """Wait a moment.

        Raises:
            TimeoutError: the limit is reached.
        """
        time.sleep(_POLL_S)
        now = time.monotonic()
        self.left -= min(now - self._before, 10 * _POLL_S)
        self._before = now
        if self.left < 0:
            raise TimeoutError("not done in time")


def until(process: subprocess.Popen[bytes], clock: Clock, is_reached: Callable[[], bool] = lambda: False) -> int | None:
    """Wait for a run's end, or until something is reached: its exit code, None while it runs.

    Raises:
        TimeoutError: neither in time.
    """
    while (code := process.poll()) is None:
        if is_reached():
            return None
        clock.tick()
    return code


def timed(process: subprocess.Popen[bytes], folder: Path, clock: Clock, first: int, last: int, options: Options) -> int:
    """Let a run go on alone from step `first` to `last`; the step after which its steps count.

    Raises:
        RuntimeError: it ended before.
        TimeoutError: it did not come so far in time.
    """
    if (code := until(process, clock, lambda: last_step(folder) >= first)) is not None:
        raise RuntimeError(f"exit code {code} before step {first}: {tail(folder)}")
    stopped = freeze(process.pid)
    try:
        with options.turn():
            thaw(stopped)
            stopped = []
            reached = last_step(folder)
            until(process, clock, lambda: last_step(folder) >= last)
    finally:
        thaw(stopped)
    # One was cut by the stop, and the next began before all was awake again.
    return min(reached + 2, last - 1)


def tail(folder: Path) -> str:
    """The last line that a run has said."""
    lines = folder.with_suffix(".log").read_text(encoding="utf-8", errors="replace").splitlines()
    return next((line for line in reversed(lines) if line.startswith("mmattn:")), lines[-1] if lines else "nothing")


def measured(recipe: str, folder: Path, steps: int, options: Options) -> dict[str, Any]:
    """Kill a run in its second half, resume it, and read the figures of the table."""
    clock, kill_at = Clock(LIMIT_S if options.device == "cuda" else LIMIT_ON_CPU_S), steps * 5 // 8
    save_every = max(1, steps // 2)
    with running(launch(recipe, folder, steps, options, save_every=save_every)) as process:
        if until(process, clock, lambda: last_step(folder) >= kill_at) is not None:
            raise RuntimeError(f"ended before it could be killed: {tail(folder)}")
    print(f"{recipe}: killed after step {last_step(folder)}", flush=True)
    with running(launch(recipe, folder, steps, options, resume=True, save_every=save_every)) as process:
        # Until it says so, the metrics are those of the run that was killed.
        until(process, clock, lambda: "resumed from" in said(folder))
        first = save_every + (TINY_UNCOUNTED if options.tiny else UNCOUNTED)
        counted = timed(process, folder, clock, first, steps, options)
        if (code := until(process, clock)) != 0:
            raise RuntimeError(f"exit code {code} when resumed: {tail(folder)}")
    resumed_at = int(re.findall(r"resumed from \S*step-(\d+)", said(folder))[-1])
    return {"killed at": kill_at, "resumed from": resumed_at, **figures(folder, steps, counted, options)}


@contextlib.contextmanager
def running(process: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """Ends it, with all that came from it, when the block does."""
    try:
        yield process
    finally:
        kill(process)


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
    clocks = [line["time"] for line in trained if line["step"] > first]
    return {
        "parameters": parameters(folder),
        "batch": batch(folder.name, options),
        "loss, first and last": f"{trained[0]['loss']:.3f}, {trained[-1]['loss']:.3f}",
        **speed(clocks),
    }


def parameters(folder: Path) -> str:
    """How many are trained."""
    number = re.findall(r"training ([\d,]+) of [\d,]+ parameters", said(folder))[-1]
    return f"{int(number.replace(',', '')) / 1e6:.1f} M"


def batch(recipe: str, options: Options) -> str:
    """Pictures of a step, or tokens."""
    words = dict(setting.removeprefix("training.batch_").split("=", 1) for setting in SIZES[recipe])
    number = "as in the recipe" if options.tiny else f"{int(words.get('size') or words['tokens']):,}"
    return f"{number} {'tokens' if recipe == 'translate' else 'pictures'}"


def speed(clocks: list[dict[str, float]]) -> dict[str, str]:
    """Cells of what `metrics.jsonl` has under `time`: medians."""

    def median(read: Any) -> float:
        return statistics.median(read(clock) for clock in clocks)

    used = [clock["mfu"] for clock in clocks if "mfu" in clock]
    return {
        "ms a step": f"{1000 * median(lambda clock: clock['step_s']):.0f}",
        "units/s": f"{median(lambda clock: clock['tokens_per_s']):,.0f}",
        "waiting for data": f"{median(lambda clock: clock['data_s'] / clock['step_s']):.0%}",
        "MFU": f"{100 * statistics.median(used):.1f}%" if used else "-",
        "peak memory": f"{clocks[-1]['peak_memory_bytes'] / 2**30:.1f} GiB",
    }


def so_far(folder: Path) -> dict[str, Any]:
    """Cells of a run that did not come to its end: what its last steps say, beside which others may have run.

    Raises:
        OSError: there are no metrics.
        IndexError: they have no step, or the log no number of parameters.
    """
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    trained = [
        line for line in map(json.loads, (line for line in lines if line.endswith("\n"))) if line["kind"] == "train"
    ]
    last = trained[-1]
    cells = speed([line["time"] for line in trained[-20:]])
    return {"reached": last["step"], "parameters": parameters(folder)} | {
        f"{name}, so far": cells[name] for name in cells
    }


def rows(table: str, row: Callable[[str, Path], dict[str, Any]], options: Options) -> int:
    """A row for each recipe; one that fails costs its own row only. The exit status: `OUT_OF_TIME` if that is all."""
    statuses = set()
    with tempfile.TemporaryDirectory() as name:
        for recipe in SIZES if options.only is None else [options.only]:
            folder = Path(name) / recipe
            try:
                cells = row(recipe, folder)
            except (RuntimeError, TimeoutError, OSError, KeyboardInterrupt) as error:
                statuses.add(OUT_OF_TIME if isinstance(error, TimeoutError) else 1)
                with contextlib.suppress(OSError):
                    print(said(folder)[-3000:], flush=True)
                with contextlib.suppress(OSError, IndexError):
                    options.add(f"{table}: cut off", recipe=recipe, **so_far(folder))
                print(f"{recipe}: {str(error) or 'interrupted'}", flush=True)
                if isinstance(error, KeyboardInterrupt):
                    return 1
                continue
            options.add(table, recipe=recipe, **cells)
    return min(statuses, default=0)


def main() -> int:
    """The table."""
    options = read_options(__doc__, list(SIZES))
    steps = TINY_STEPS if options.tiny else STEPS
    precision = "bf16" if options.device == "cuda" else "float32"
    table = f"Training by accelerate launch, {precision}, {steps} steps"
    return rows(table, lambda recipe, folder: measured(recipe, folder, steps, options), options)


if __name__ == "__main__":
    sys.exit(main())
