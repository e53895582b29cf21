"""The checks behind scripts/accept/maps.sh; models are those of other runs, or trained where there are none."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from lines import BIN, RUNS, Checks, main, relayed, report, run, tests, train

COST, MEMORY = 1.3, 50.0  # times the layers' own time; MiB
SCENES = 200
# Config of a run, the figures of `mmattn maps --score` and their goals; None: to be printed.
SCORED = {
    "vlm": ("vlm/scenes", {"maps/pointing": 0.80, "maps/iou": 0.50}),
    "translate": ("translate/scenes", {"alignment/f1": 0.90}),
    "diffusion": ("diffusion/scenes", {"maps/pointing": None, "maps/iou": None}),
}


def cost() -> None:
    """1: time and memory of recording ten words."""
    file = RUNS / "maps.json"
    file.unlink(missing_ok=True)
    code, _, _ = run([BIN / "python", "scripts/bench/maps.py", "--json", file], RUNS / "maps.log")
    for row in json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []:
        if "more" in row:
            report(f"1 {row['row']}: more", f"{row['more']:.1f}", f"at most {MEMORY:g}", row["more"] <= MEMORY)
            continue
        figure, eager = row["recorded/fused"], row["eager/fused"]
        what = f"1 {row['row']}: recorded beside fused (eager {eager:.2f})"
        report(what, f"{figure:.2f}", f"at most {COST:g}", figure <= COST)
    report("1 scripts/bench/maps.py", f"exit code {code}", "0", code == 0)


def right() -> None:
    """2: on every family: maps are eager's, rows sum to 1, outputs and modules stay."""
    tests(2, "U-Nets with LoRA, IP-Adapter, ControlNet; text to image", "tests/maps/test_denoising.py")
    tests(2, "vision-language models and translators", "tests/maps/test_record.py", "tests/maps/test_translations.py")
    tests(2, "Marian, T5, Whisper, BLIP, Mllama", "tests/maps/test_stock_models.py")
    tests(2, "weights beside float64", "tests/maps/test_weights.py")


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
            is_ok = value > chance if goal is None else value >= goal
            shown = "more than chance" if goal is None else f"at least {goal:g}"
            report(f"3 {config}: {name} (chance {chance:.2f})", f"{value:.2f}", shown, is_ok)


def steering() -> None:
    """4: equalities, maps written out, adapters, and scores on scenes."""
    tests(4, "equal where nothing changes, else as written out; LoRA, IP-Adapter", "tests/maps/test_steer.py")
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
