"""The checks behind scripts/accept/translate.sh; trainings run the command that a user would run."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from lines import RUNS, Checks, benchmark, evaluate, main, report, run, tests, train

HELP_PACKAGES = ("libreoffice-help-en-us", "libreoffice-help-de")
SCENES = RUNS / "translate-scenes"
WHOLE = "evaluation.limit=null"
Scores = dict[str, Any]


def speed() -> None:
    """1: beside transformers and CTranslate2 at OPUS-MT's size."""
    benchmark(1, "scripts/bench/translate.py", "translate")
    below = [line for line in (RUNS / "translate.log").read_text(encoding="utf-8").splitlines() if "below" in line]
    for line in below:
        print(f"  {line.strip()}", flush=True)


def memory() -> None:
    """2: what is held while decoding, and how a step's time grows."""
    benchmark(2, "scripts/bench/translate_memory.py", "translate_memory")


def at_least(what: str, scores: Scores, name: str, goal: float) -> None:
    """One score and what it must reach."""
    value = scores.get(name, float("nan"))
    report(what, f"{value:.3f}", f"at least {goal:.3g}", value >= goal)


def trained() -> None:
    """3: scenes from scratch, on combinations that training never shows; real text from files that it never shows."""
    if train(3, "translate/scenes", SCENES, 10):
        scores = evaluate(SCENES, WHOLE)
        at_least("3 scenes, held-out combinations: exact match", scores, "heldout/exact", 0.99)
        at_least("3 scenes, alignment F1", scores, "heldout/alignment/f1", 0.9)
    guided = RUNS / "translate-scenes-guided"
    if train(3, "translate/scenes", guided, 10, "examples.guided_alignment_weight=0.05"):
        scores = evaluate(guided, WHOLE)
        at_least("3 scenes, guided: exact match", scores, "heldout/exact", 0.99)
        at_least("3 scenes, guided: alignment F1", scores, "heldout/alignment/f1", 0.9)
    with tempfile.TemporaryDirectory() as unpacked:
        path = office_help(Path(unpacked))
        if path is not None:
            trained_help(path)


def office_help(folder: Path) -> str | None:
    """Where LibreOffice's help lies unpacked, fetched into `folder` if need be."""
    if "OFFICE_HELP" in os.environ:
        return os.environ["OFFICE_HELP"]
    code, _, _ = run(["apt-get", "download", *HELP_PACKAGES], RUNS / "office-help-download.log", folder)
    debs = sorted(folder.glob("*.deb"))
    if code or len(debs) < len(HELP_PACKAGES):
        report(f"3 packages {', '.join(HELP_PACKAGES)}", "not to be had", "downloaded", False)
        return None
    for deb in debs:
        subprocess.run(["dpkg-deb", "-x", str(deb), str(folder)], check=True)
    return str(folder)


def trained_help(path: str) -> None:
    """Real text: beside copying the source and the nearest training sentence; and what 8 bits do to it."""
    folder, data = RUNS / "translate-office-help", f"data.path={path}"
    if not train(3, "translate/office-help", folder, None, data):
        return
    scores = evaluate(folder, data, WHOLE, "evaluation.splits=[test]")
    best = max(scores.get("test/copy/chrf", 100.0), scores.get("test/memory/chrf", 100.0))
    value = scores.get("test/chrf", float("nan"))
    report("3 office help, unseen files: chrF", f"{value:.1f}", f"above {best:.1f}", value > best)
    print(f"  copy {scores.get('test/copy/chrf', 0):.1f}, nearest sentence {scores.get('test/memory/chrf', 0):.1f}")
    print(f"  BLEU {scores.get('test/bleu', 0):.1f}  {scores.get('bleu/signature')}  {scores.get('chrf/signature')}")
    eight = evaluate(folder, data, WHOLE, "evaluation.splits=[test]", "evaluation.quantize=int8")
    eight_value = eight.get("test/chrf", float("nan"))
    report("3 office help, int8: chrF", f"{eight_value:.1f}", f"printed ({value:.1f})", eight_value == eight_value)


def fewer_heads() -> None:
    """4: half and a quarter of the K/V heads, self and cross, and 5 % more steps."""
    if not (SCENES / "final").is_dir() and not train(4, "translate/scenes", SCENES, None):
        return
    before = evaluate(SCENES, WHOLE).get("heldout/exact", float("nan"))
    for heads in (2, 1):
        for how in ("svd", "mean", "first", "random"):
            folder = RUNS / f"translate-scenes-{heads}-{how}"
            overrides = (f"model.kv_heads.decoder={heads}", f"model.kv_heads.how={how}")
            if not train(4, "translate/scenes-gqa", folder, None, f"model.from_pretrained={SCENES}", *overrides):
                continue
            after = evaluate(folder, WHOLE).get("heldout/exact", float("nan"))
            goal = f"at least {before - 0.01:.3f}" if how == "svd" else "beside it"
            what = f"4 exact match, {heads} of 4 K/V heads, {how}"
            report(what, f"{after:.3f}", goal, how != "svd" or after >= before - 0.01)
        cache(heads)


def cache(heads: int) -> None:
    """Bytes of a run's caches beside those of the model with all heads."""
    from mmattn import Translator

    text = ["A red circle is above a blue square."] * 7
    peaks = []
    for folder in (SCENES / "final", RUNS / f"translate-scenes-{heads}-svd" / "final"):
        translator = Translator.from_pretrained(folder)
        translator.translate(text, num_beams=3, max_new_tokens=40, min_new_tokens=40)
        assert translator.peak_memory is not None
        peaks.append(translator.peak_memory)
    for name, (whole, less) in {
        "context K/V": (peaks[0].context, peaks[1].context),
        "self K/V": (peaks[0].cache, peaks[1].cache),
    }.items():
        report(
            f"4 {name}, {heads} of 4 heads", f"{less / whole:.3f}", f"{heads / 4:g} of it", less * 4 == whole * heads
        )


def parity() -> None:
    """5: tests beside stock transformers and CTranslate2."""
    names = ("marian", "m2m100", "translator_decoding", "translator_round_trip", "ctranslate2")
    tests(5, "parity and round trips", *(f"tests/parity/test_{name}.py" for name in names))
    tests(5, "fine-tuned folders in transformers and CTranslate2", "tests/recipes/test_translate.py")


def bad_input() -> None:
    """6: messages and exit codes."""
    files = ("recipes/test_translate_bad_input", "cli/test_translate", "inference/test_line_translation", "data")
    paths = [f"tests/{name}" if name == "data" else f"tests/{name}.py" for name in files]
    tests(6, "bad input: one line, right exit code, nothing lost", *paths)


CHECKS: Checks = {"1": speed, "2": memory, "3": trained, "4": fewer_heads, "5": parity, "6": bad_input}


if __name__ == "__main__":
    sys.exit(main(CHECKS))
