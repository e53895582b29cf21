"""The checks behind scripts/accept/diffusion.sh; trainings run the command that a user would run."""

from __future__ import annotations

import json
import sys

from lines import BIN, RUNS, Checks, benchmark, evaluate, kills, main, report, run, tests, train

SCENES = RUNS / "diffusion-scenes"
GUIDANCE = 2
MOST_LOST = 0.02  # accuracy on what was known before
LEARNED = 0.8  # of the pictures of the word that is taught


def parity() -> None:
    """1: beside stock diffusers, in float32."""
    tests(1, "U-Net: outputs, gradients, folders", "tests/parity", "tests/models", "tests/nn", "-k", "unet or names")
    tests(1, "pipelines of SD 1.5, SD 2.1 and SDXL, LoRA both ways", "tests/parity", "-k", "stable_diffusion")
    tests(
        1, "TextToImage, pixel pipeline, files", "tests/inference", "-k", "text_to_image or pixel or unet or encoding"
    )


def scenes() -> None:
    """2: from scratch, scored on pairs of colour and shape that training never shows."""
    if train(2, "diffusion/scenes", SCENES, 60):
        score_scenes()
    kills(2, "diffusion/debug", "training.max_steps=60", "training.save_every=5", "training.eval_every=20")


def score_scenes() -> None:
    """What the trained model draws, read back by the checker."""
    overrides = ["evaluation.splits=[heldout]", "evaluation.loss=false"]
    scores = evaluate(SCENES, *overrides, "evaluation.limit=400", f"evaluation.guidance_scales=[1,{GUIDANCE},4]")
    for scale in (1, GUIDANCE, 4):
        for part, goal in {"color": 0.95, "shape": None, "both": 0.70, "all": None}.items():
            value = scores.get(f"heldout/1_object/guidance_{scale}/{part}", float("nan"))
            is_goal = goal is not None and scale == GUIDANCE
            what = f"2 one object, held-out pair, guidance {scale}: {part}"
            report(what, f"{value:.1%}", f"{goal:.0%}" if is_goal else "reported", not is_goal or value >= goal)
        for part in ("color", "shape", "both", "relation", "all"):
            value = scores.get(f"heldout/2_object/guidance_{scale}/{part}", float("nan"))
            report(f"2 two objects, guidance {scale}: {part}", f"{value:.1%}", "reported", value == value)


def keys_and_values() -> None:
    """3: a word for one held-out pair is taught by keys and values of the cross-attention and one new token."""
    tests(3, "only keys and values change; the file opens in stock", "tests/models/test_unet_kv_file.py")
    tests(3, "trained by the recipe, opened in a stock pipeline", "tests/recipes/test_diffusion.py", "-k", "keys")
    log = RUNS / "diffusion-kv.log"
    code, _, text = run([BIN / "python", "scripts/accept/scenes_kv.py", SCENES, RUNS / "diffusion-kv"], log)
    lines = [line for line in text.splitlines() if line.startswith("{")]
    if code or not lines:
        report("3 teaching a word", f"exit code {code}", "0", False)
        return
    figures = json.loads(lines[-1])
    report("3 tensors of the U-Net that changed", figures["changed"], figures["named"], figures["is_exact"])
    report("3 tensors of the file, all of them keys or values", figures["held"], figures["named"], figures["is_exact"])
    report(
        "3 a stock U-Net with the file predicts the same",
        f"{figures['difference']:.1e}",
        "below 1e-4",
        figures["difference"] < 1e-4,
    )
    before, alone, after = (figures[f"word_{when}"] for when in ("before", "alone", "after"))
    what = f"3 a new word for {figures['pair']}: before, vector alone, and after"
    shown = f"{before:.0%}, {alone:.0%} -> {after:.0%}"
    report(what, shown, f"at least {LEARNED:.0%}", after >= LEARNED and after > max(before, alone))
    before, after = figures["pair_before"], figures["pair_after"]
    report(f"3 {figures['pair']} by its own words", f"{before:.0%} -> {after:.0%}", "reported", True)
    before, after = figures["old_before"], figures["old_after"]
    goal = f"at most {MOST_LOST:.0%} less"
    report(
        "3 pairs of training, right before and after", f"{before:.1%} -> {after:.1%}", goal, after >= before - MOST_LOST
    )


def speed() -> None:
    """4: beside stock at the size of Stable Diffusion 1.5."""
    benchmark(4, "scripts/bench/unet.py", "unet")


def bad_input() -> None:
    """5: messages and exit codes."""
    tests(5, "recipe", "tests/recipes/test_diffusion.py", "tests/recipes/test_diffusion_bad_input.py")
    tests(5, "pictures and captions", "tests/data", "-k", "text_to_image or bucket or captions or picture")
    tests(
        5,
        "generation and the command line",
        "tests/inference",
        "tests/cli",
        "-k",
        "text_to_image or generate or encoding",
    )


CHECKS: Checks = {"1": parity, "2": scenes, "3": keys_and_values, "4": speed, "5": bad_input}


if __name__ == "__main__":
    sys.exit(main(CHECKS))
