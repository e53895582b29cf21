"""The checks behind scripts/accept/kernels.sh."""

from __future__ import annotations

import json
import re
import sys

from lines import BIN, RUNS, Checks, main, report, run

SHORT_KEYS = RUNS / "short_keys.json"


def interpreter() -> None:
    """1: the tests marked `interpreter`, in a process of their own."""
    words = [BIN / "python", "-m", "pytest", "-m", "interpreter", "tests/kernels"]
    code, seconds, text = run(words, RUNS / "kernels_interpreter.log", TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    passed = re.search(r"(\d+) passed", text)
    report("1 interpreter tests against float64", f"{passed.group(1) if passed else 0} passed", "all", code == 0)
    report("1 interpreter tests, one core", f"{seconds:.0f} s", "90 s", seconds <= 90)


def ahead_of_time() -> None:
    """2: every kernel compiled for capability 8.0 and 9.0, its resources read from the cubin."""
    words = [BIN / "python", "scripts/gpu/kernel_resources.py"]
    code, seconds, text = run(words, RUNS / "kernel_resources.log")
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if re.match(r"\| [89]\.0", line)]
    for capability, shared_kib in (("8.0", 163), ("9.0", 227)):
        own = [row for row in rows if row[0] == capability]
        for part in ("fwd", "bwd"):
            spilt = [int(row[7]) for row in own if part in row[3]]
            goal = "at most 700" if part == "fwd" else "at most 1400"
            is_ok = bool(spilt) and max(spilt) <= (700 if part == "fwd" else 1400)
            what = f"2 {part} kernels for {capability}: most bytes spilt by one of {len(spilt)}"
            report(what, f"{max(spilt, default=-1)}", goal, is_ok)
        shared = max((int(row[6]) for row in own), default=0) // 1024
        report(
            f"2 kernels for {capability}: most shared memory",
            f"{shared} KiB",
            f"{shared_kib}",
            0 < shared <= shared_kib,
        )
    report("2 scripts/gpu/kernel_resources.py", f"{seconds:.0f} s", "exit code 0", code == 0)


def has_card() -> bool:
    """Is there a CUDA card?"""
    code, _, _ = run([BIN / "python", "-c", "import torch; assert torch.cuda.is_available()"], RUNS / "has_card.log")
    return code == 0


def on_a_card() -> None:
    """3: the tests marked `gpu`."""
    if not has_card():
        report("3 tests on a card: no CUDA card here", "not run", "all pass", False)
        return
    code, seconds, text = run([BIN / "python", "-m", "pytest", "-m", "gpu", "tests/kernels"], RUNS / "kernels_gpu.log")
    passed = re.search(r"(\d+) passed", text)
    report("3 tests on a card", f"{passed.group(1) if passed else 0} in {seconds:.0f} s", "all pass", code == 0)


def speed() -> None:
    """4: beside torch's kernels."""
    if not has_card():
        report("4 speed on a card: no CUDA card here (docs/kernels.md has a table)", "not run", "see below", False)
        return
    SHORT_KEYS.unlink(missing_ok=True)
    words = [BIN / "python", "scripts/gpu/short_keys.py", "--rows", SHORT_KEYS]
    code, _, _ = run(words, RUNS / "short_keys.log")
    lines = SHORT_KEYS.read_text(encoding="utf-8").splitlines() if SHORT_KEYS.is_file() else []
    for cells in (json.loads(line)["cells"] for line in lines):
        is_forward = cells["pass"] == "forward"
        if not is_forward and cells["batch"] == "16":
            continue
        goal = 1.2 if is_forward else 2.0
        ratio = float(cells["best of torch / ours"])
        report(f"4 {cells['shape']}, batch {cells['batch']}, {cells['pass']}", f"{ratio:.2f}", f"{goal}", ratio >= goal)
    report("4 scripts/gpu/short_keys.py", f"exit code {code}", "0", code == 0)


CHECKS: Checks = {"1": interpreter, "2": ahead_of_time, "3": on_a_card, "4": speed}

if __name__ == "__main__":
    sys.exit(main(CHECKS))
