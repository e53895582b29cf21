"""The checks behind scripts/accept/training.sh; every one runs the command that a user would run."""

from __future__ import annotations

import sys

from card_page import card_page, has_card, number
from lines import BIN, ROOT, RUNS, Checks, benchmark, kills, main, relayed, report, run, tests

KILLS = {"translate": 34, "vlm": 33, "diffusion": 33}
KILLED = ("training.max_steps=120", "training.save_every=5", "training.eval_every=30")
MFU_GOAL = 0.40
ZERO3 = ("", "_memory", "_parts")
RECIPES = ("translate", "vlm", "diffusion")


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
    """2: DDP and FSDP2 of all three recipes, and DeepSpeed's ZeRO-3."""
    tests(2, "sharding: FSDP2 gives the losses of one process", "tests/training/test_sharding.py")
    tests(2, "sharding: ZeRO-3 gives the losses of DDP", *(f"tests/training/test_zero3{part}.py" for part in ZERO3))
    tests(2, "recipes in DDP, FSDP2 and ZeRO-3: train, save, resume, export, evaluate", "tests/recipes/test_sharded.py")
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
    """6: the first part of scripts/gpu_check.sh: on this machine's card, else those that were committed, and here that
    it runs."""
    if not has_card():
        command = ["bash", "scripts/gpu_check.sh", "--part", "training", "--device", "cpu", "--tiny"]
        code, _, _ = run(command, RUNS / "gpu-training.log", MMATTN_PYTHON=str(BIN / "python"))
        what = "6 each recipe by accelerate launch, killed, resumed, on a CPU, in tiny sizes"
        report(what, f"exit code {code}", "0", code == 0)
    page = card_page()
    if page is None:
        report("6 no CUDA card here, and no docs/gpu.json", "not measured", "a page", False)
        return
    outcome = page.parts.get("training", {"error": "not run"})
    what = f"6 each recipe killed and resumed on a card ({page.where('training')})"
    report(what, outcome["error"] or "ok", "ok", outcome["error"] is None)
    for recipe in RECIPES:
        figures, most = [], 0.0
        for part, what in (("training", "killed and resumed"), ("training_compiled", "torch_compile")):
            for row in page.rows(part, "recipe", "MFU", "parameters"):
                if row["recipe"] == recipe:
                    figures.append(f"{row['MFU']} {what}, {row['parameters']}")
                    most = max(most, number(str(row["MFU"]).rstrip("%")))
        what = f"6 {recipe}, bf16: MFU ({page.where('training')})"
        report(what, "; ".join(figures) or "no row", f"{MFU_GOAL:.0%}", most >= 100 * MFU_GOAL)


CHECKS: Checks = {"1": exact, "2": sharded, "3": speed, "4": streaming, "5": launching, "6": card}


if __name__ == "__main__":
    sys.exit(main(CHECKS))
