"""The checks behind scripts/accept/vlm.sh; every one runs the command that a user would run."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

from lines import BIN, ROOT, RUNS, Checks, benchmark, evaluate, kills, main, report, run, tests

STAMPS_PACKAGE = "tuxpaint-stamps-default"


def fresh_folder(name: str) -> Path:
    """An output folder that does not exist yet."""
    RUNS.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix=f"{name}-", dir=RUNS)) / "run"


def clone(folder: Path) -> Path:
    """The committed state in a folder of its own."""
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)
    return folder


def quickstart() -> None:
    """1: the README's first command, from a fresh clone."""
    with tempfile.TemporaryDirectory() as folder:
        copy = clone(Path(folder) / "mmattn")
        install = "source scripts/install.sh && install_mmattn recipes,plot"
        code, seconds, _ = run(["bash", "-c", install], RUNS / "install.log", copy)
        report("1 install from a fresh clone", f"{seconds:.0f} s", "exit code 0", code == 0)
        code, seconds, text = run(["bash", "scripts/quickstart.sh"], RUNS / "quickstart.log", copy)
        report(
            "1 quickstart after the install", f"{seconds:.0f} s", "at most 300 s, code 0", code == 0 and seconds <= 300
        )
        report("1 scores beside the picture-blind baseline", "printed", "in the output", "without the picture" in text)
        maps = sorted((copy / "runs/demo/show").glob("*_*.png"))
        report("1 heat map files", str(len(maps)), "at least 1", bool(maps))
        hit = re.search(r"looked for .*: (True|False)\)", text)
        found = hit.group(1) if hit else "none"
        report("1 peak of the first map lies on the object named", found, "True", found == "True")
        is_said = (copy / "runs/demo/show/captions.txt").is_file()
        report("1 captions and answers written", str(is_said), "True", is_said)


SCENES_GOALS = [
    ("test/caption_1", 0.98),
    ("heldout/caption_1", 0.85),
    ("test/caption_2", 0.90),
    ("heldout/caption_2", 0.70),
    ("test/answers", 0.97),
    ("heldout/answers", 0.88),
    ("test/relation_check", 0.90),
    ("heldout/relation_check", 0.90),
]


def scenes() -> None:
    """2: training on scenes, scored on unseen pictures and on pairs of colour and shape that training never shows."""
    folder = fresh_folder("scenes")
    code, seconds, _ = run(
        [BIN / "mmattn", "train", "vlm/scenes", f"training.output_dir={folder}"], RUNS / "scenes.log"
    )
    report(
        "2 mmattn train vlm/scenes", f"{seconds / 60:.1f} min", "at most 20 min, code 0", code == 0 and seconds <= 1200
    )
    scores = evaluate(folder, "evaluation.splits=[test,heldout]", "evaluation.limit=null")
    for name, goal in SCENES_GOALS:
        report_score(f"2 {name}", scores, name, goal)
    for name in sorted(set(scores) - {name for name, _ in SCENES_GOALS}):
        if not name.endswith("/blind"):
            report_score(f"2 {name}", scores, name, None)


def report_score(what: str, scores: dict[str, float], name: str, goal: float | None) -> None:
    """A share of right answers beside the picture-blind baseline's; the goal None means to beat that."""
    blind = scores.get(f"{name}/blind", 0.0)
    wanted = blind if goal is None else goal
    value = scores.get(name, float("nan"))
    is_ok = value > wanted if goal is None else value >= wanted
    text = f"above blind {wanted:.1%}" if goal is None else f"{wanted:.0%} (blind {blind:.1%})"
    report(what, f"{value:.1%}", text, is_ok)


def stamps() -> None:
    """3: real pictures; families that training never shows."""
    folder = fresh_folder("stamps")
    with tempfile.TemporaryDirectory() as unpacked:
        code, _, _ = run(["apt-get", "download", STAMPS_PACKAGE], RUNS / "stamps-download.log", Path(unpacked))
        debs = list(Path(unpacked).glob("*.deb"))
        if code or not debs:
            report(f"3 package {STAMPS_PACKAGE}", "not to be had", "downloaded", False)
            return
        subprocess.run(["dpkg-deb", "-x", str(debs[0]), unpacked], check=True)
        path = f"data.path={unpacked}"
        command = [BIN / "mmattn", "train", "vlm/stamps", f"training.output_dir={folder}", path]
        code, seconds, _ = run(command, RUNS / "stamps.log")
        report("3 mmattn train vlm/stamps", f"{seconds / 60:.1f} min", "exit code 0", code == 0)
        scores = evaluate(folder, path)
        report_score("3 test/category", scores, "test/category", None)
        # An unseen kind of thing has, mostly, an unseen name: beside a random order, without a goal.
        for name in ("test/recall_at_1", "test/recall_at_5"):
            beside = f"reported ({scores.get(f'{name}/blind', 0):.1%})"
            report(f"3 {name} (random order beside it)", f"{scores.get(name, 0):.1%}", beside, name in scores)
        report(
            "3 test/caption, exact (blind beside it)",
            f"{scores.get('test/caption', 0):.1%}",
            f"reported ({scores.get('test/caption/blind', 0):.1%})",
            "test/caption" in scores,
        )


def blip() -> None:
    """4: parity with stock BLIP, and what is trained and what is not."""
    tests(4, "BLIP: parity with transformers and round trip", "tests/parity")
    tests(4, "gate 0 leaves the text model's logits as they are", "tests/models", "tests/nn", "-k", "gate")
    tests(4, "cross-attention only, LoRA merged, says what it trains", "tests/recipes/test_vlm.py")


def speed() -> None:
    """5: beside stock BLIP at its real size."""
    benchmark(5, "scripts/bench/vlm_inference.py", "vlm_inference")


def killed() -> None:
    """6: SIGKILL at random steps and inside saves."""
    kills(6, "vlm/debug", "training.max_steps=60", "training.save_every=5", "training.eval_every=20")


def fresh_tests() -> None:
    """7: the README's second command, from a fresh clone, and the wheel."""
    with tempfile.TemporaryDirectory() as folder:
        copy = clone(Path(folder) / "mmattn")
        code, seconds, text = run(["bash", ".ci/run"], RUNS / "ci.log", copy)
        passed = re.search(r"(\d+) passed", text)
        count = passed.group(1) if passed else "0"
        report(
            "7 .ci/run from a fresh clone: tests passed", f"{count}, {seconds / 60:.0f} min", "exit code 0", code == 0
        )
        is_called = "scripts/test.sh" in (copy / ".ci/run").read_text(encoding="utf-8")
        report("7 .ci/run calls scripts/test.sh", str(is_called), "True", is_called)
        report("7 wheel in an empty environment", "trained", "vlm/debug done", "wheel: mmattn" in text)


def bad_input() -> None:
    """8: messages and exit codes."""
    tests(
        8, "bad input: one line, right exit code, nothing half-written", "tests/recipes/test_bad_input.py", "tests/cli"
    )


CHECKS: Checks = {
    "1": quickstart,
    "2": scenes,
    "3": stamps,
    "4": blip,
    "5": speed,
    "6": killed,
    "7": fresh_tests,
    "8": bad_input,
}


if __name__ == "__main__":
    sys.exit(main(CHECKS))
