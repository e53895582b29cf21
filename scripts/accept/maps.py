"""The checks behind scripts/accept/maps.sh; models are those of other runs, or trained where there are none."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from lines import BIN, RUNS, Checks, main, relayed, report, run, tests, train

COST, MEMORY = 1.3, 50.0  # times the layers' own time; MiB
COST_ROWS = ("sd15 64x64", "sd15 32x32", "sd15 16x16", "512 keys", "1024 keys", "memory, 64x64 latents (MiB)")
PACKAGE = "attention-map-diffusers"  # that others record with
SCENES = 200
# Config of a run, the figures of `mmattn maps --score` and their goals; None: to be printed.
SCORED = {
    "vlm": ("vlm/scenes", {"maps/pointing": 0.80, "maps/iou": 0.50}),
    "translate": ("translate/scenes", {"alignment/f1": 0.90}),
    "diffusion": ("diffusion/scenes", {"maps/pointing": None, "maps/iou": None}),
}


def cost() -> None:
    """1: time and memory of recording ten words, beside eager attention and another package."""
    file, package = RUNS / "maps.json", RUNS / "package"
    file.unlink(missing_ok=True)
    shutil.rmtree(package, ignore_errors=True)
    # Into a folder of its own, so that nothing of what is tested is replaced.
    install = [BIN / "python", "-m", "pip", "install", "--quiet", "--no-deps", "--target", package, PACKAGE]
    run(install, RUNS / "maps-package.log")
    code, _, _ = run([BIN / "python", "scripts/bench/maps.py", "--json", file, "--package", package], RUNS / "maps.log")
    rows = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
    measured = {row["row"]: row for row in rows}
    for name in COST_ROWS:
        row = measured.get(name)
        if row is None:
            report(f"1 {name}", "not measured", "a figure", is_ok=False)
        elif "more" in row:
            report(f"1 {name}: more", f"{row['more']:.1f}", f"at most {MEMORY:g}", row["more"] <= MEMORY)
        else:
            _cost_row(name, row)
    report("1 scripts/bench/maps.py", f"exit code {code}", "0", code == 0)


def _cost_row(name: str, row: dict[str, Any]) -> None:
    figure, eager = row["recorded/fused"], row["eager/fused"]
    what = f"1 {name}: recorded beside fused (eager {eager:.2f})"
    report(what, f"{figure:.2f}", f"at most {COST:g}", figure <= COST)
    ways = {way: row[way] for way in ("package exact/fused", "package fast/fused") if way in row}
    shown = ", ".join(f"{way.split()[1].split('/')[0]} {value:.2f}" for way, value in ways.items())
    best = min(ways.values(), default=float("nan"))
    report(f"1 {name}: {PACKAGE} ({shown or row.get('package', 'no figure')})", f"{best:.2f}", "a figure", bool(ways))


def right() -> None:
    """2: on every family: maps are eager's, rows sum to 1, outputs and modules stay."""
    tests(2, "U-Nets with LoRA, IP-Adapter, ControlNet; text to image", "tests/maps/test_denoising.py")
    tests(2, "words of prompts and embeddings, interrupts, threads", "tests/maps/test_drawn_texts.py")
    tests(2, "joint attention of SD 3 and FLUX.1", "tests/maps/test_joint.py")
    tests(2, "vision-language models and translators", "tests/maps/test_record.py", "tests/maps/test_translations.py")
    stock = ("tests/maps/test_stock_models.py", "tests/maps/test_stock_generation.py")
    tests(2, "Marian, T5, Whisper, BLIP, Mllama", *stock)
    tests(2, "weights beside float64", "tests/maps/test_weights.py")
    tests(2, "weights from the forward's own pass", "tests/maps/test_same_pass.py")


def trained(config: str) -> Path | None:
    """The folder of a run, trained when it is not there; None when that fails."""
    folder = RUNS / config.replace("/", "-")
    if (folder / "final").is_dir() or train(3, config, folder, None):
        return folder
    return None


def truth() -> None:
    """3: maps beside what is known of scenes, each figure with chance."""
    for kind, (config, goals) in SCORED.items():
        folder = trained(config)
        if folder is None:
            continue
        command = [BIN / "mmattn", "maps", "-m", folder, "--score", str(SCENES), "--json"]
        code, _, text = run(command, RUNS / f"maps-{kind}.log")
        lines = [line for line in text.splitlines() if line.startswith("{")]
        scores = json.loads(lines[-1]) if code == 0 and lines else {}
        for name, goal in goals.items():
            value, chance = scores.get(name, float("nan")), scores.get(f"{name}/chance", float("nan"))
            is_ok = value > chance and (goal is None or value >= goal)
            shown = "more than chance" if goal is None else f"at least {goal:g}"
            report(f"3 {config}: {name} (chance {chance:.2f})", f"{value:.2f}", shown, is_ok)


def steering() -> None:
    """4: equalities, maps written out, adapters, and scores on scenes."""
    tests(4, "equal where nothing changes, else as written out; LoRA, IP-Adapter", "tests/maps/test_steer.py")
    tests(4, "shares of the steps, image to image, inference mode", "tests/maps/test_steer_generations.py")
    tests(4, "one call beside float64; regions at any resolution", "tests/maps/test_steer_changes.py")
    folder = trained("diffusion/scenes")
    if folder is not None:
        relayed(4, "scripts/accept/scenes_steer.py", str(folder))


def page() -> None:
    """5: the page in a headless Chromium."""
    tests(5, "mmattn ui", "tests/ui")


def bad_input() -> None:
    """6: messages."""
    tests(6, "steering", "tests/maps/test_steer_edits.py")
    chosen = "wrong or nothing or refused or compiled or cannot or named or there"
    tests(6, "recording and the command line", "tests/maps", "tests/cli/test_maps.py", "-k", chosen)


CHECKS: Checks = {"1": cost, "2": right, "3": truth, "4": steering, "5": page, "6": bad_input}


if __name__ == "__main__":
    sys.exit(main(CHECKS))
