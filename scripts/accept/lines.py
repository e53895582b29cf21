"""What the acceptance scripts share: a line for each check, commands run into a log file, checks chosen by number."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BIN = ROOT / ".venv" / "bin"
RUNS = ROOT / "runs" / "accept"

Checks = Mapping[str, Callable[[], None]]
verdicts: list[bool] = []


def report(what: str, figure: str, goal: str, is_ok: bool) -> None:
    """Print one line."""
    verdicts.append(is_ok)
    print(f"{what:<66} {figure:>16}   {goal:<22} {'ok' if is_ok else 'short'}", flush=True)


def run(arguments: list[str | Path], log: Path, cwd: Path = ROOT, **env: str) -> tuple[int, float, str]:
    """Run a command into a log file: its exit code, seconds and output."""
    log.parent.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    with log.open("wb") as file:
        done = subprocess.run(
            [str(part) for part in arguments],
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=os.environ | env,
            check=False,
        )
    text = log.read_text(encoding="utf-8", errors="replace")
    return done.returncode, time.perf_counter() - started, text


def tests(number: int, what: str, *paths: str) -> None:
    """Tests by path, as one line: how many passed."""
    code, seconds, text = run(
        [BIN / "python", "-m", "pytest", *paths], RUNS / f"tests-{number}.log", HF_HUB_OFFLINE="1"
    )
    passed = re.search(r"(\d+) passed", text)
    report(f"{number} {what}", f"{passed.group(1) if passed else 0} in {seconds:.0f} s", "all pass", code == 0)


def benchmark(number: int, script: str, name: str, *arguments: str) -> None:
    """A benchmark that writes its rows with `--json`: a line for each row that has a goal."""
    file = RUNS / f"{name}.json"
    file.unlink(missing_ok=True)
    code, _, _ = run([BIN / "python", script, *arguments, "--json", file], RUNS / f"{name}.log")
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"] if file.is_file() else []
    for row in rows:
        if row["goal"] is not None:
            report(f"{number} {row['name']}", f"{row['value']:.2f}", f"{row['goal']:g}", row["ok"])
    report(f"{number} {' '.join([script, *arguments])}", f"exit code {code}", "0", code == 0)


def main(checks: Checks) -> int:
    """Run the checks named on the command line, or all: 1 when a line is short."""
    names = sys.argv[1:] or list(checks)
    unknown = [name for name in names if name not in checks]
    if unknown:
        sys.exit(f"no check {unknown[0]}: choose from {' '.join(checks)}")
    for name in names:
        checks[name]()
    return 0 if all(verdicts) else 1
