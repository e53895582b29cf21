"""The checks behind scripts/accept/kernels.sh."""

from __future__ import annotations

import re
import sys

from card_page import card_page, number
from lines import BIN, ROOT, RUNS, Checks, main, report, run

from mmattn.ops.backends import triton

PASSES = ("forward", "forward + backward")
UNETS = (
    *(f"SD 1.5 cross, {side} x {side}" for side in (64, 32, 16)),
    *(f"SDXL cross, {side} x {side}" for side in (64, 32)),
)
GPU_PARTS = (
    "tests",
    "short_keys",
    "attention",
    "decode",
    "varlen",
    "packed",
    "maps",
    "compiled",
    "translator",
    "vlm",
    "diffusion",
)
# Bytes a thread: backwards hold the gradients of all keys (docs/kernels.md).
SPILT = {"fwd": 700, "maps": 700, "bwd": 1400, "decode": 0, "norm": 0, "gated": 0, "biased_sum": 0}
RATIO, GRAPHED = "best of torch / ours", "eager / graphed"
# What issue 8 wants in the page: a part, columns that tell the table, of which the first has to have a number.
TABLES = (
    ("FlexAttention beside", "attention", ("mmattn flex",)),
    ("varlen beside torch's kernels", "varlen", ("mmattn varlen", "cuDNN", "floor")),
    ("packed short sequences beside varlen", "packed", ("triton_packed", "varlen", "floor")),
    ("decoding beside torch's kernels", "decode", ("triton_decode", "cuDNN", "floor")),
    ("eager, compiled and graphed models", "compiled", ("graphed", "eager", "what")),
)
KERNEL = re.compile(r"^def (\w+)_kernel\(", re.MULTILINE)


def interpreter() -> None:
    """1: the tests marked `interpreter`, in a process of their own."""
    words = [BIN / "python", "-m", "pytest", "-n", "2", "-m", "interpreter", "tests/kernels"]
    code, seconds, text = run(words, RUNS / "kernels_interpreter.log", TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    passed = re.search(r"(\d+) passed", text)
    report("1 interpreter tests against float64", f"{passed.group(1) if passed else 0} passed", "all", code == 0)
    report("1 interpreter tests, two processes", f"{seconds:.0f} s", "150 s", seconds <= 150)


def ahead_of_time() -> None:
    """2: every kernel compiled for capability 8.0 and 9.0, its resources read from the cubin."""
    words = [BIN / "python", "scripts/gpu/kernel_resources.py"]
    code, seconds, text = run(words, RUNS / "kernel_resources.log")
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if re.match(r"\| [89]\.0", line)]
    for capability, shared_kib in (("8.0", 163), ("9.0", 227)):
        own = [row for row in rows if row[0] == capability]
        for part, most in SPILT.items():
            spilt = [int(row[7]) for row in own if part in row[3]]
            what = f"2 {part} kernels for {capability}: most bytes spilt by one of {len(spilt)}"
            is_ok = bool(spilt) and max(spilt) <= most
            report(what, f"{max(spilt, default=-1)}", f"at most {most}", is_ok)
        shared = max((int(row[6]) for row in own), default=0) // 1024
        report(
            f"2 kernels for {capability}: most shared memory",
            f"{shared} KiB",
            f"{shared_kib}",
            0 < shared <= shared_kib,
        )
    report("2 scripts/gpu/kernel_resources.py", f"{seconds:.0f} s", "exit code 0", code == 0)


def on_a_card() -> None:
    """3: the tests marked `gpu`, and every table in one page."""
    page = card_page()
    if page is None:
        report("3 no CUDA card here, and no docs/gpu.json", "not measured", "a page", False)
        return
    for part in GPU_PARTS:
        outcome = page.parts.get(part, {"error": "not run", "last_line": ""})
        count = re.search(r"(\d+) passed", outcome["last_line"])
        said = outcome["error"] or (f"{count.group(1)} passed" if count and part == "tests" else "ok")
        report(f"3 {part} on a card ({page.where(part)})", said, "ok", outcome["error"] is None)
    spent = page.seconds / 60
    report("3 all parts together", f"{spent:.1f} min", "15 min", spent <= 15)
    machines = all({"card", "driver", "torch", "triton"} <= set(of["machine"]) for of in page.runs)
    report("3 card, driver and versions in the page", "there" if machines else "not all", "there", machines)
    for what, part, columns in TABLES:
        rows = [row for row in page.rows(part, *columns) if number(row[columns[0]]) > 0]
        report(f"3 {what} ({page.where(part)})", f"{len(rows)} rows", "1 or more", bool(rows))
    rows = page.rows("attention", "cuDNN", "flash", "efficient", "batch", "pass", "floor")
    found = {(row["shape"], int(row["batch"]), row["pass"]) for row in rows}
    cells = [(shape, batch, kind) for shape in UNETS for batch in (2, 4, 16) for kind in PASSES]
    have = sum(cell in found for cell in cells)
    report(
        f"3 five U-Net shapes, batch 2, 4, 16, both passes ({page.where('attention')})",
        f"{have} rows",
        f"{len(cells)}",
        have == len(cells),
    )


def speed() -> None:
    """4: beside torch's kernels, and a translator's step beside its eager one."""
    page = card_page()
    if page is None:
        report("4 no CUDA card here, and no docs/gpu.json", "not measured", "a page", False)
        return
    rows = page.rows("short_keys", "shape", "batch", "pass", RATIO)
    judged = [row for row in rows if row["shape"] in UNETS and (row["pass"] == PASSES[0] or int(row["batch"]) <= 4)]
    for row in judged:
        # The goal of the backward is for the shapes of SD 1.5.
        goal = 1.2 if row["pass"] == PASSES[0] else 2.0 if row["shape"].startswith("SD 1.5") else 1.0
        ratio = number(row[RATIO])
        what = f"4 {row['shape']}, batch {row['batch']}, {row['pass']} ({page.where('short_keys')})"
        report(what, f"{ratio:.2f}", f"{goal}", ratio >= goal)
    if not judged:
        report(f"4 short keys beside torch's best ({page.where('short_keys')})", "no row", "1.2 and 2.0", False)
    steps = [row for row in page.rows("compiled", "what", GRAPHED) if row["what"].startswith("translator")]
    best = max((number(row[GRAPHED]) for row in steps if number(row[GRAPHED]) > 0), default=0.0)
    report(f"4 graphed translator step over eager ({page.where('compiled')})", f"{best:.2f}", "5", best >= 5)
    shapes = triton.BACKEND.auto_shapes or ()
    is_set = bool(shapes) and triton.BACKEND.auto_devices == ("cuda",)
    report("4 auto takes triton at the measured shapes", f"{len(shapes)} rows", "switched on", is_set)


def described() -> None:
    """5: docs/kernels.md has every kernel, a figure and a floor, and when auto takes it."""
    text = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    files = sorted((ROOT / "mmattn" / "kernels").glob("*.py"))
    kernels = [name for file in files for name in KERNEL.findall(file.read_text(encoding="utf-8"))]
    named = [name for name in kernels if f"`{name}`" in text or f"`{name}_kernel`" in text]
    report("5 kernels in docs/kernels.md", f"{len(named)} of {len(kernels)}", "all", len(named) == len(kernels) > 0)
    for heading in ("## What each kernel does", "## Measured", "## When `auto` takes it"):
        report(f"5 docs/kernels.md: {heading}", "there" if heading in text else "missing", "there", heading in text)


CHECKS: Checks = {"1": interpreter, "2": ahead_of_time, "3": on_a_card, "4": speed, "5": described}

if __name__ == "__main__":
    sys.exit(main(CHECKS))
