"""Prove and measure mmattn on a CUDA card: tests, then measurements, one Markdown page; see scripts/gpu_check.sh.

Every part is a process of its own with a time limit; a part that fails costs its own rows only. Exit status 0: all
well, 1: a part failed, 2: no CUDA card.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from report import ROOT, Outcome, page, read_rows

HERE = Path(__file__).parent
# Seconds; together under 10 minutes. A part that is done early leaves the rest to those after it.
LIMITS = {"training": 240, "tests": 125, "attention": 50, "translator": 65, "vlm": 40, "diffusion": 70}
TOTAL = 590


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="scripts/gpu_check.sh", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the tests only; writes no page")
    parser.add_argument("--output", type=Path, metavar="FILE", help="the page (docs/gpu.md, when every part is run)")
    parser.add_argument("--logs", type=Path, metavar="FOLDER", help="keep each part's output here")
    parser.add_argument("--part", choices=LIMITS, action="append", help="only this one (may be repeated)")
    parser.add_argument("--seconds", type=float, default=TOTAL, help=f"for all parts together (default {TOTAL})")
    # To see on a CPU that every script runs: sizes that mean nothing.
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help=argparse.SUPPRESS)
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def test_files() -> list[str]:
    """Where tests are marked `gpu`: their folder, and single files beside other tests."""
    single = [
        path
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        if path.parent.name != "gpu" and "pytest.mark.gpu" in path.read_text(encoding="utf-8")
    ]
    return ["tests/gpu", *(str(path.relative_to(ROOT)) for path in single)]


def command(part: str, options: argparse.Namespace, rows: Path) -> list[str]:
    """What a part runs."""
    if part != "tests":
        tiny = ["--tiny"] if options.tiny else []
        return [sys.executable, str(HERE / f"{part}.py"), "--device", options.device, "--rows", str(rows), *tiny]
    workers = str(max(1, min(12, (os.cpu_count() or 2) * 3 // 4)))
    words = ["-m", "gpu", "-q", "-n", workers, "--dist", "worksteal", "--tb=short", "--show-capture=no", "-rN"]
    words += ["--durations=10", "-p", "no:cacheprovider", "-p", "no:benchmark", "-p", "failures"]
    return [sys.executable, "-m", "pytest", *words, *test_files()]


def run_part(part: str, options: argparse.Namespace, rows: Path, log: Path, limit: float) -> Outcome:
    """Run one part to its end or limit; its output goes to the log and is shown when it fails."""
    settings = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    settings |= {"MMATTN_TEST_DEVICE": options.device, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    if part == "tests":  # in processes side by side
        settings |= {"OMP_NUM_THREADS": "2", "TORCHINDUCTOR_COMPILE_THREADS": "2"}
    path = os.pathsep.join(filter(None, [str(ROOT), str(HERE), os.environ.get("PYTHONPATH", "")]))
    begin = time.monotonic()
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command(part, options, rows),
            cwd=ROOT,
            env={**os.environ, **settings, "PYTHONPATH": path},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(timeout=limit)
            error = None if code == 0 else f"exit status {code}"
        except subprocess.TimeoutExpired:
            error = f"not done in {limit:.0f} s"
        finally:
            _end(process)
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return Outcome(part, time.monotonic() - begin, error, lines[-1].strip()[:200] if lines else "no output")


def _end(process: subprocess.Popen[bytes]) -> None:
    """An interrupt, on which pytest says what has failed and Python where it was; then the end of all processes."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=5)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def show(outcome: Outcome, log: Path) -> None:
    """A line for a part; for one that failed what it said, tests by their names."""
    result = "ok" if outcome.error is None else f"FAILED ({outcome.error})"
    print(f"== {outcome.part}: {result}, {outcome.seconds:.0f} s: {outcome.last_line}", flush=True)
    if outcome.error is not None:
        text = log.read_text(encoding="utf-8", errors="replace")
        failed = re.findall(r"^(?:FAILED|ERROR) .*$", text, flags=re.MULTILINE)
        print("\n".join(f"   {line[:300]}" for line in failed or text.splitlines()[-15:]), flush=True)


def main() -> int:
    """Every part, then the page."""
    options = arguments()
    if options.device == "cuda" and not torch.cuda.is_available():
        print(f"gpu_check.sh: no CUDA card here (torch {torch.__version__} sees none): nothing was checked")
        return 2
    parts = options.part or (["tests"] if options.quick else list(LIMITS))
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    outcomes = []
    with tempfile.TemporaryDirectory() as name:
        folder = options.logs or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        rows, end = folder / "rows.jsonl", time.monotonic() + options.seconds
        rows.unlink(missing_ok=True)
        for place, part in enumerate(parts):
            # What earlier parts have left over, but not what later ones may need.
            limit = end - time.monotonic() - sum(LIMITS[later] for later in parts[place + 1 :])
            limit = max(limit, min(LIMITS[part], end - time.monotonic()), 1.0)
            log = folder / f"{part}.log"
            outcomes.append(run_part(part, options, rows, log, limit))
            show(outcomes[-1], log)
        output = options.output
        if output is None and parts == list(LIMITS):
            output = ROOT / "docs" / "gpu.md"
        if output is not None:
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(page(read_rows(rows), outcomes, date, options.device), encoding="utf-8")
            print(f"written: {output}")
    return 1 if any(outcome.error for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
