"""What the acceptance scripts share: a line for each check, commands run into a log file, checks chosen by number."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

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
            report(f"{number} {row['name']}", f"{row['value']:.3f}", f"{row['goal']:g}", row["ok"])
    report(f"{number} {' '.join([script, *arguments])}", f"exit code {code}", "0", code == 0)


def relayed(number: int, *arguments: str) -> None:
    """A script that prints such lines itself: its lines, under this check's number."""
    code, _, text = run([BIN / "python", *arguments], RUNS / f"{Path(arguments[0]).stem}.log")
    for line in text.splitlines():
        if line.endswith((" ok", " short")):
            verdicts.append(line.endswith(" ok"))
            print(f"{number} {line}", flush=True)
    report(f"{number} {' '.join(arguments)}", f"exit code {code}", "0", code == 0)


def train(number: int, config: str, folder: Path, goal_minutes: float | None, *overrides: str) -> bool:
    """`mmattn train` into an empty folder, as one line with its time; whether it succeeded."""
    shutil.rmtree(folder, ignore_errors=True)
    command = [BIN / "mmattn", "train", config, f"training.output_dir={folder}", *overrides]
    code, seconds, _ = run(command, RUNS / f"{folder.name}.log")
    in_time = goal_minutes is None or seconds <= 60 * goal_minutes
    goal = "exit code 0" if goal_minutes is None else f"at most {goal_minutes:g} min"
    report(
        f"{number} mmattn train {' '.join((config, *overrides))[:44]}",
        f"{seconds / 60:.1f} min",
        goal,
        code == 0 and in_time,
    )
    return code == 0


def evaluate(folder: Path, *overrides: str) -> dict[str, Any]:
    """What `mmattn eval` says."""
    code, _, text = run([BIN / "mmattn", "eval", folder, "--json", *overrides], RUNS / f"{folder.name}-eval.log")
    lines = [line for line in text.splitlines() if line.startswith("{")]
    return json.loads(lines[-1]) if code == 0 and lines else {}


def kills(number: int, config: str, *overrides: str, count: int = 10) -> None:
    """SIGKILL at random steps and inside saves of a short training, and what that leaves."""
    RUNS.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="kills-", dir=RUNS)) / "run"
    command = [BIN / "mmattn", "train", config, *overrides]
    script = ["scripts/accept/kill_resume.py", "--kills", str(count), "--work", work]
    code, _, text = run([BIN / "python", *script, "--", *command], RUNS / f"kills-{config.partition('/')[0]}.log")
    for line in text.splitlines():
        if line.endswith((": ok", ": short")):
            what, _, verdict = line.rpartition(": ")
            report(f"{number} {what}", "", "", verdict == "ok")
    report(f"{number} {config}: {count} kills, resumed each time", f"exit code {code}", "0", code == 0)


def main(checks: Checks) -> int:
    """Run the checks named on the command line, or all: 1 when a line is short."""
    names = sys.argv[1:] or list(checks)
    unknown = [name for name in names if name not in checks]
    if unknown:
        sys.exit(f"no check {unknown[0]}: choose from {' '.join(checks)}")
    for name in names:
        checks[name]()
    return 0 if all(verdicts) else 1
