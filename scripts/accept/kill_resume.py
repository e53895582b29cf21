"""Kill a training run again and again, resume it each time, and compare it with an unbroken run, bit for bit.

    python scripts/accept/kill_resume.py --kills 10 --work runs/kills -- mmattn train vlm/debug training.save_every=5

What stands after `--` is the training command; the output folder and `--resume` are added to it.

Half of the kills come at random steps, half as soon as a save's temporary folder appears. After each kill every
checkpoint folder must match its manifest. In the end the metrics (their clock aside) and the weights in `final/` and
`best/` must equal the unbroken run's. Prints a line for each, and exits with 1 when one falls short.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from mmattn.errors import CheckpointError
from mmattn.training import read_metrics, verify_checkpoint

_POLL_S = 0.0005


@dataclass(frozen=True)
class Command:
    """How to start the run in a folder of its own."""

    arguments: tuple[str, ...]
    output_key: str

    def start(self, folder: Path, log: Path, *, resume: bool) -> subprocess.Popen[bytes]:
        arguments = [*self.arguments, f"{self.output_key}={folder}", *(["--resume"] if resume else [])]
        with open(log, "ab") as file:
            return subprocess.Popen(arguments, stdout=file, stderr=file, start_new_session=True)


def kill(process: subprocess.Popen[bytes]) -> None:
    """End a run at once: all its processes, those of a launcher (in sessions of their own) too."""
    try:
        children = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        children = []
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    process.wait()
    psutil.wait_procs(children, timeout=60)


def last_step(folder: Path) -> int:
    """The newest step in the metrics of a run that may be writing them."""
    try:
        with open(folder / "metrics.jsonl", "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 65536))
            lines = file.read().split(b"\n")[:-1]
        return int(json.loads(lines[-1])["step"]) if lines else 0
    except (OSError, ValueError, KeyError):
        return 0


def is_saving(folder: Path) -> bool:
    """Whether a half-written checkpoint lies there."""
    return any(folder.glob("checkpoints/.tmp-step-*"))


def saved_step(folder: Path) -> int:
    """The step of the newest checkpoint, by name."""
    return max((int(path.name[5:]) for path in folder.glob("checkpoints/step-*") if path.name[5:].isdigit()), default=0)


def run_piece(command: Command, folder: Path, log: Path, *, step: int | None, delay_s: float) -> tuple[bool, bool]:
    """Run until `step`, or with `step` None until a save begins, and kill: (was killed, was inside a save)."""
    has_checkpoint = saved_step(folder) > 0
    for leftover in () if not is_saving(folder) else folder.glob("checkpoints/.tmp-step-*"):
        # The next process removes it at its start; moved away now, it cannot be taken for a save of that process.
        leftover.rename(leftover.with_name(leftover.name.replace("step", "old")))
    process = command.start(folder, log, resume=has_checkpoint)
    try:
        while process.poll() is None:
            if is_saving(folder) if step is None else last_step(folder) >= step:
                time.sleep(delay_s)
                kill(process)
                return process.returncode == -signal.SIGKILL, is_saving(folder)
            time.sleep(_POLL_S)
    finally:
        if process.poll() is None:
            kill(process)
    if process.returncode != 0:
        tail = log.read_text(errors="replace").splitlines()[-5:]
        raise SystemExit(f"the run failed by itself with exit code {process.returncode}:\n" + "\n".join(tail))
    return False, False


def damaged_checkpoints(folder: Path) -> list[str]:
    """What is wrong with any folder that has a checkpoint's name."""
    problems = []
    for path in folder.glob("checkpoints/step-*"):
        try:
            verify_checkpoint(path)
        except CheckpointError as error:
            problems.append(str(error))
    return problems


def timeless(folder: Path) -> list[dict]:
    """The metrics without their clock."""
    lines = read_metrics(folder / "metrics.jsonl")
    return [{key: value for key, value in line.items() if key != "time"} for line in lines]


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of the published weights."""
    paths = [path for name in ("final", "best") for path in (folder / name).rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


@dataclass
class Tally:
    """The kills so far."""

    kills: int = 0
    inside: int = 0


def kill_and_resume(command: Command, folder: Path, log: Path, kills: int, steps: int, seed: int) -> tuple[Tally, list]:
    """Kill a run `kills` times on its way to its end; the tally, and what was ever half there."""
    draws, tally, problems = random.Random(seed), Tally(), []
    for _ in range(20 * kills):
        if tally.kills >= kills:
            break
        at_save = tally.inside < kills // 2 and tally.kills % 2 == 1
        reached = saved_step(folder)
        ahead = max(1, 2 * (steps - reached) // (kills - tally.kills + 1))
        step = None if at_save else min(steps - 1, reached + draws.randint(1, ahead))
        was_killed, was_inside = run_piece(
            command, folder, log, step=step, delay_s=draws.uniform(0, 0.02 if at_save else 0.1)
        )
        if not was_killed:
            break
        tally.kills, tally.inside = tally.kills + 1, tally.inside + was_inside
        problems += damaged_checkpoints(folder)
        where = "inside a save" if was_inside else "between saves"
        print(
            f"kill {tally.kills}: {where}, metrics at step {last_step(folder)}, saved {saved_step(folder)}", flush=True
        )
    run_piece(command, folder, log, step=sys.maxsize, delay_s=0)
    return tally, problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", nargs="+", help="the training command, after `--`")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--work", type=Path, required=True, help="an empty folder for the two runs")
    parser.add_argument("--output-key", default="training.output_dir")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.work.exists() and any(options.work.iterdir()):
        parser.error(f"{options.work} is not empty")
    options.work.mkdir(parents=True, exist_ok=True)
    command = Command(tuple(options.command), options.output_key)
    unbroken, broken, log = options.work / "unbroken", options.work / "broken", options.work / "log.txt"
    run_piece(command, unbroken, log, step=sys.maxsize, delay_s=0)
    steps = last_step(unbroken)
    tally, problems = kill_and_resume(command, broken, log, options.kills, steps, options.seed)
    ours, theirs = timeless(broken), timeless(unbroken)
    same = next((line for line, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), None)
    checks = [
        (f"kills: {tally.kills} of {options.kills}, {tally.inside} inside a save", tally.kills >= options.kills),
        (f"checkpoints half there: {len(problems)} {'; '.join(problems[:3])}".rstrip(), not problems),
        (
            f"metrics of {steps} steps equal bit for bit" + ("" if same is None else f": differ from line {same + 1}"),
            ours == theirs,
        ),
        ("final and best weights equal", digests(broken) == digests(unbroken) and bool(digests(broken))),
    ]
    for text, is_right in checks:
        print(f"{text}: {'ok' if is_right else 'short'}")
    return 0 if all(is_right for _, is_right in checks) else 1


if __name__ == "__main__":
    raise SystemExit(main())
