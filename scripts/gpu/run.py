"""Prove and measure mmattn on a CUDA card: tests, then measurements, one Markdown page; see scripts/gpu_check.sh.

Every part is a process of its own with a time limit; a part that fails costs its own rows only. What is kept of a run
(`--keep`) can be joined into a later page (`--join`): two short runs make one page. Exit status 0: all well, 1: a part
failed, 2: no CUDA card.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from report import ROOT, Outcome, Run, chosen, machine, now, page, read_run, table_data

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Part:
    """A script, what it may take in seconds, and its place in the page."""

    script: str
    seconds: float


# The most important first: a page that is cut off lacks the last. Together under 15 minutes. A part that is done early
# leaves the rest to those after it; where less is given for all, each gets its share of that.
PARTS = {
    "training": Part("training.py", 260),
    "training_compiled": Part("training_compiled.py", 130),
    "tests": Part("pytest", 145),
    "short_keys": Part("short_keys.py", 70),
    "compiled": Part("compiled.py", 100),
    "decode": Part("decode.py", 30),
    "packed": Part("packed.py", 30),
    "varlen": Part("varlen.py", 20),
    "maps": Part("map_output.py", 25),
    "attention": Part("attention.py", 30),
    "translator": Part("translator.py", 15),
    "vlm": Part("vlm.py", 15),
    "diffusion": Part("diffusion.py", 15),
}
TOTAL = 890
PAGE = ROOT / "docs" / "gpu.md"


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="scripts/gpu_check.sh", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the tests only; writes no page")
    parser.add_argument("--output", type=Path, metavar="FILE", help="the page (docs/gpu.md, when it has every part)")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep each part's output and rows here")
    parser.add_argument("--part", choices=PARTS, action="append", help="only this one (may be repeated)")
    parser.add_argument("--seconds", type=float, default=TOTAL, help=f"for all parts together (default {TOTAL})")
    parser.add_argument(
        "--join",
        type=Path,
        action="append",
        default=[],
        metavar="FOLDER",
        help="a folder that an earlier run kept: the page gets its parts too (may be repeated). Without --part nothing "
        "is run, and no card is needed",
    )
    # To see on a CPU that every script runs: sizes that mean nothing.
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help=argparse.SUPPRESS)
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    for folder in options.join:
        if not (folder / "run.json").is_file():
            parser.error(f"--join {folder}: no run.json there; give a folder that --keep has filled")
    return options


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
        return [sys.executable, str(HERE / PARTS[part].script), "--device", options.device, "--rows", str(rows), *tiny]
    workers = str(max(1, min(12, (os.cpu_count() or 2) * 3 // 4)))
    words = ["-m", "gpu", "-q", "-n", workers, "--dist", "worksteal", "--tb=short", "--show-capture=no", "-rN"]
    words += ["--durations=10", "-p", "no:cacheprovider", "-p", "no:benchmark", "-p", "failures"]
    return [sys.executable, "-m", "pytest", *words, *test_files()]


def run_part(part: str, options: argparse.Namespace, folder: Path, limit: float) -> Outcome:
    """Run one part to its end or limit; its output goes to the log and is shown when it fails."""
    settings = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    settings |= {"MMATTN_TEST_DEVICE": options.device, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    if part == "tests":  # in processes side by side
        settings |= {"OMP_NUM_THREADS": "2", "TORCHINDUCTOR_COMPILE_THREADS": "2"}
    path = os.pathsep.join(filter(None, [str(ROOT), str(HERE), os.environ.get("PYTHONPATH", "")]))
    log, begin = folder / f"{part}.log", time.monotonic()
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command(part, options, folder / f"{part}.jsonl"),
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
    text = log.read_text(encoding="utf-8", errors="replace")
    lines = [line for line in text.splitlines() if line.strip()]
    last_line = lines[-1].strip()[:150] if lines else "no output"
    failed = re.findall(r"^(?:FAILED|ERROR) (tests/\S+)", text, flags=re.MULTILINE)
    return Outcome(part, time.monotonic() - begin, error, last_line, list(dict.fromkeys(failed))[:40])


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
    if outcome.error is not None and log.is_file():
        text = log.read_text(encoding="utf-8", errors="replace")
        failed = re.findall(r"^(?:FAILED|ERROR) .*$", text, flags=re.MULTILINE)
        print("\n".join(f"   {line[:300]}" for line in failed or text.splitlines()[-15:]), flush=True)


def run_parts(parts: list[str], options: argparse.Namespace, folder: Path) -> Run:
    """Each in its turn; what is known is kept after each."""
    end, limits = time.monotonic() + options.seconds, {part: PARTS[part].seconds for part in parts}
    share = min(1.0, options.seconds / sum(limits.values()))
    run = Run(now(), machine(options.device), [])
    for place, part in enumerate(parts):
        (folder / f"{part}.jsonl").unlink(missing_ok=True)
        left = end - time.monotonic()
        # What earlier parts have left over, but not what later ones may need.
        limit = left - share * sum(limits[later] for later in parts[place + 1 :])
        limit = max(limit, min(share * limits[part], left))
        if limit < 1.0:
            run.outcomes.append(Outcome(part, 0.0, "not begun: no time was left", ""))
        else:
            run.outcomes.append(run_part(part, options, folder, limit))
        show(run.outcomes[-1], folder / f"{part}.log")
        run.write(folder)
    return run


def main() -> int:
    """Every part, then the page."""
    options = arguments()
    parts = options.part or (["tests"] if options.quick else [] if options.join else list(PARTS))
    if parts and options.device == "cuda" and not torch.cuda.is_available():
        print(f"gpu_check.sh: no CUDA card here (torch {torch.__version__} sees none): nothing was checked")
        return 2
    with tempfile.TemporaryDirectory() as name:
        folder = options.keep or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        own = [run_parts(parts, options, folder)] if parts else []
        runs = [*(read_run(each) for each in options.join), *(read_run(folder) for _ in own)]
        kept = chosen(runs, list(PARTS))
        output = options.output or (PAGE if len(kept) == len(PARTS) else None)
        if output is not None:
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(page(runs, kept), encoding="utf-8")
            output.with_suffix(".json").write_text(table_data(runs, kept), encoding="utf-8")
            print(f"written: {output} and {output.with_suffix('.json')}")
        elif not options.quick:
            print(
                f"no page: without {', '.join(part for part in PARTS if part not in kept)} it would not be whole "
                "(--output FILE writes what there is, --join FOLDER adds an earlier run)"
            )
    return 1 if any(outcome.error for run in own for outcome in run.outcomes) else 0


if __name__ == "__main__":
    # A part is ended with its processes, whoever ends this one.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(main())
