"""A translator trained on a million streamed pairs: memory stays flat, and a run that is killed goes on exactly.

    python scripts/accept/stream.py [--examples 1000000] [--kinds parquet jsonl] [--work runs/stream]

For each kind of shards: writes the pairs, trains a small model on all of them once, by `mmattn train`, and samples the
memory of its processes. Then the same run is killed (SIGKILL) at a random step and resumed. Its losses, and all else in
metrics.jsonl but the clock, must equal the unbroken run's. Prints a line for each figure, and exits with 1 when one
falls short.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from kill_resume import Command, damaged_checkpoints, kill, last_step, timeless
from lines import BIN, ROOT, report, verdicts

from mmattn.config import load_config, load_recipe
from mmattn.training.batches import make_sampler

SHARDS = 20
ROW_GROUP = 10_000
STEPS = 250  # about as many; by examples exactly
SAMPLE_S = 0.25
GROWTH_MIB = 48  # of all processes together
WORDS = [f"{first}{second}" for first in "bdfgklmnprst" for second in ("a", "e", "i", "o", "u")]

Columns = dict[str, list[str]]


@dataclass
class Memory:
    """Resident memory of a run's processes, in MiB, with the step at which each sample was taken."""

    samples: list[tuple[int, float]] = field(default_factory=list)

    def sample(self, process: subprocess.Popen[bytes], step: int) -> None:
        try:
            root = psutil.Process(process.pid)
            sizes = [each.memory_info().rss for each in (root, *root.children(recursive=True))]
        except psutil.NoSuchProcess:
            return
        self.samples.append((step, sum(sizes) / 2**20))

    def growth(self, steps: int) -> float:
        """By how much the last quarter lies above the second: medians, which single peaks do not move."""
        early = [size for step, size in self.samples if steps / 4 <= step < steps / 2]
        late = [size for step, size in self.samples if 3 * steps / 4 <= step < steps]
        return statistics.median(late) - statistics.median(early) if early and late else float("nan")


def write_shards(folder: Path, kind: str, examples: int) -> None:
    """Pairs of 2 to 7 made-up words, and their turned round translations."""
    if (folder / "done").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    draws = random.Random(7)
    for shard in range(SHARDS):
        first, end = (examples * place // SHARDS for place in (shard, shard + 1))
        sources = [draws.choices(WORDS, k=2 + number % 6) for number in range(first, end)]
        columns = {
            "source": [" ".join(words) for words in sources],
            "target": [" ".join(reversed(words)) for words in sources],
        }
        path = folder / f"{shard:03}.{kind}"
        (write_parquet if kind == "parquet" else write_jsonl)(path, columns)
    (folder / "done").touch()


def write_parquet(path: Path, columns: Columns) -> None:
    pq.write_table(pa.table(columns), path, row_group_size=ROW_GROUP)


def write_jsonl(path: Path, columns: Columns) -> None:
    with path.open("w", encoding="utf-8") as file:
        for source, target in zip(*columns.values(), strict=True):
            file.write(json.dumps({"source": source, "target": target}) + "\n")


def overrides(work: Path, kind: str, examples: int) -> list[str]:
    """A small translator on these shards; Parquet in batches by tokens, the others by examples."""
    size = examples // STEPS
    batches = [f"batch_tokens={6 * size}"] if kind == "parquet" else ["batch_tokens=null", f"batch_size={size}"]
    training = [*batches, "eval_every=0", f"save_every={25}", "device=cpu", "num_workers=1", "warmup_steps=20"]
    data = [f"path={work / kind}", f"index_folder={work / 'index'}", "size=100000", "eval_size=1000"]
    return [
        *[f"data.{value}" for value in ("kind=files", "streaming=true", *data)],
        *[f"model.network.{value}" for value in ("embed_dim=16", "encoder_ffn_dim=16", "decoder_ffn_dim=16")],
        "model.network.decoder_layers=1",
        "examples.guided_alignment_weight=0",
        "evaluation.splits=[]",
        "evaluation.best=null",
        *[f"training.{value}" for value in training],
    ]


def steps_of_an_epoch(values: list[str]) -> int:
    """Steps in which every pair is drawn once. It also indexes the shards, as the first run would."""
    recipe = load_recipe("translate")
    config = load_config(recipe.Config, "translate/debug", values)
    if config.training.batch_tokens is None:
        return len(recipe.TranslateTask(config)) // config.training.batch_size
    remarks = " ".join(make_sampler(recipe.TranslateTask(config), config.training).remarks())
    found = re.search(r"([\d,]+) batches an epoch", remarks)
    assert found is not None, remarks
    return int(found.group(1).replace(",", ""))


def run(
    command: Command, folder: Path, log: Path, *, kill_at: int | None = None, memory: Memory | None = None
) -> float:
    """Run to the end, or until a step and kill; its seconds."""
    started = time.perf_counter()
    process = command.start(folder, log, resume=any(folder.glob("checkpoints/step-*")))
    try:
        while process.poll() is None:
            step = last_step(folder)
            if kill_at is not None and step >= kill_at:
                break
            if memory is not None:
                memory.sample(process, step)
            time.sleep(SAMPLE_S)
    finally:
        if process.poll() is None:
            kill(process)
    if kill_at is None and process.returncode != 0:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-5:])
        sys.exit(f"the run failed with exit code {process.returncode}:\n{tail}")
    return time.perf_counter() - started


def check(work: Path, kind: str, examples: int, seed: int) -> None:
    """All lines for one kind of shards."""
    write_shards(work / kind, kind, examples)
    values = overrides(work, kind, examples)
    started = time.perf_counter()
    steps = steps_of_an_epoch([*values, f"training.output_dir={work / 'unused'}"])
    report(f"{kind}: indexing and, by tokens, counting", f"{time.perf_counter() - started:.0f} s", "reported", True)
    arguments = (str(BIN / "mmattn"), "train", "translate/debug", *values, f"training.max_steps={steps}")
    command = Command(arguments, "training.output_dir")
    whole, broken = work / f"{kind}-whole", work / f"{kind}-broken"
    for folder in (whole, broken):
        shutil.rmtree(folder, ignore_errors=True)
    memory = Memory()
    seconds = run(command, whole, work / f"{kind}-whole.log", memory=memory)
    lines = timeless(whole)
    drawn = lines[-1]["examples"]
    report(f"{kind}: examples in one epoch of {steps} steps", f"{drawn:,}", f"{examples:,}", drawn == examples)
    report(f"{kind}: the unbroken run", f"{seconds:.0f} s", "reported", True)
    growth = memory.growth(steps)
    top = max((size for _, size in memory.samples), default=0.0)
    report(f"{kind}: memory at most, all processes", f"{top:,.0f} MiB", "reported", True)
    name = f"{kind}: its growth from 2nd to last quarter"
    report(name, f"{growth:+.1f} MiB", f"at most {GROWTH_MIB} MiB", growth <= GROWTH_MIB)
    kill_at = random.Random(seed).randrange(steps // 10, 9 * steps // 10)
    run(command, broken, work / f"{kind}-broken.log", kill_at=kill_at)
    damaged = damaged_checkpoints(broken)
    report(f"{kind}: killed at step {last_step(broken)}, damaged checkpoints", str(len(damaged)), "0", not damaged)
    run(command, broken, work / f"{kind}-broken.log")
    resumed = timeless(broken)
    same = sum(one == other for one, other in zip(lines, resumed, strict=False))
    report(f"{kind}: equal lines of metrics after resuming", f"{same} of {len(lines)}", "all", resumed == lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=1_000_000)
    parser.add_argument("--kinds", nargs="+", choices=("parquet", "jsonl"), default=["parquet", "jsonl"])
    parser.add_argument("--work", type=Path, help="where to work; a folder that is removed afterwards, if not given")
    parser.add_argument("--seed", type=int, default=3, help="of the step at which the run is killed")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # and with it the run at hand
    if arguments.examples < 1 or arguments.examples % STEPS:
        parser.error(f"--examples must be a multiple of {STEPS}")
    if arguments.work is not None:
        for kind in arguments.kinds:
            check(arguments.work.resolve(), kind, arguments.examples, arguments.seed)
    else:
        (ROOT / "runs").mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="stream-", dir=ROOT / "runs") as work:
            for kind in arguments.kinds:
                check(Path(work), kind, arguments.examples, arguments.seed)
    return 0 if all(verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
