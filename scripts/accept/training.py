"""The checks behind scripts/accept/training.sh; every one runs the command that a user would run."""

from __future__ import annotations

import json
import sys

import torch
from lines import BIN, ROOT, RUNS, Checks, benchmark, kills, main, relayed, report, run, tests

KILLS = {"translate": 34, "vlm": 33, "diffusion": 33}
KILLED = ("training.max_steps=120", "training.save_every=5", "training.eval_every=30")
MFU_GOAL = 0.40


def exact() -> None:
    """1: every sentence of docs/reliability.md has a test; then random kills."""
    training, processes = "tests/training", "tests/training/test_processes.py"
    tests(1, "micro-batches of unequal length are one batch, in float64", f"{training}/test_step.py")
    samplers = ("sampler", "token_sampler", "groups", "window_sampler")
    tests(1, "batches by (seed, step)", *(f"{training}/test_{name}.py" for name in samplers))
    tests(1, "the toy on 1, 2, 3 and 4 processes; resumed with other numbers", processes, "-k", "losses or batch")
    tests(1, "every recipe's losses on 1, 2 and 4 processes", "tests/recipes/test_processes.py")
    tests(1, "killed and resumed is unbroken, bit for bit", f"{training}/test_resume.py", "-k", "killed")
    tests(1, "checkpoints are whole or absent", f"{training}/test_checkpoint.py", f"{training}/test_loop.py")
    tests(1, "signals, in an evaluation and in a save too", f"{training}/test_resume.py", "-k", "sig")
    chosen = "bad or full or signal or dead"
    tests(1, "several processes: bad data, full disk, signals, a dead worker", processes, "-k", chosen)
    tests(1, "a dead process ends all in seconds", "tests/cli/test_train_launch.py", "-k", "killed or signal")
    tests(1, "what a resume refuses", f"{training}/test_start.py", f"{training}/test_recipe_settings.py")
    for recipe, count in KILLS.items():
        kills(1, f"{recipe}/debug", *KILLED, count=count)


def sharded() -> None:
    """2: DDP and FSDP2 of all three recipes."""
    tests(2, "sharding: FSDP2 gives the losses of one process", "tests/training/test_sharding.py")
    tests(2, "recipes in DDP and FSDP2: train, save, resume, export, evaluate", "tests/recipes/test_sharded.py")
    tests(2, "mmattn export", "tests/cli/test_export.py")


def speed() -> None:
    """3: beside stock, alternating."""
    tests(3, "packed losses are those of padded examples, one by one", "tests", "-k", "packed or packing")
    benchmark(3, "scripts/bench/train.py", "train")


def streaming() -> None:
    """4: a million examples."""
    paths = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests/data").glob("test_stream_*.py"))
    tests(4, "streams: shards, formats, order, batches", *paths, "tests/training/test_window_sampler.py")
    tests(4, "every recipe trained from shards, killed, with workers", "tests/recipes/test_streaming.py")
    relayed(4, "scripts/accept/stream.py")


def launching() -> None:
    """5: four ways to start the same recipe and config."""
    tests(5, "mmattn train, -n 2, accelerate launch, torchrun", "tests/cli/test_train_launch.py", "-k", "each_way")
    tests(5, "mmattn plot", "tests/cli/test_plot.py")


def card() -> None:
    """6: the first part of scripts/gpu_check.sh; without a card only that it runs."""
    has_card = torch.cuda.is_available()
    rows = RUNS / "gpu-training" / "training.jsonl"
    command = ["bash", "scripts/gpu_check.sh", "--part", "training", "--keep", rows.parent, "--seconds", "2700"]
    command += ["--output", rows.parent / "page.md", *([] if has_card else ["--device", "cpu", "--tiny"])]
    code, _, _ = run(command, RUNS / "gpu-training.log", MMATTN_PYTHON=str(BIN / "python"))
    where = "on a card" if has_card else "on a CPU, in tiny sizes"
    report(f"6 each recipe by accelerate launch in bf16, killed, resumed, {where}", f"exit code {code}", "0", code == 0)
    lines = rows.read_text(encoding="utf-8").splitlines() if rows.is_file() else []
    for cells in (json.loads(line)["cells"] for line in lines):
        mfu = cells["MFU"]
        is_ok = mfu != "-" and float(mfu.rstrip("%")) >= 100 * MFU_GOAL
        report(f"6 {cells['recipe']}: MFU", mfu if has_card else "no card", f"{MFU_GOAL:.0%}", is_ok)


CHECKS: Checks = {"1": exact, "2": sharded, "3": speed, "4": streaming, "5": launching, "6": card}


if __name__ == "__main__":
    sys.exit(main(CHECKS))
