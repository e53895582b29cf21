"""How a process of a run with several says why it failed: a file for its launcher, in torchrun's format."""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from mmattn.training.devices import PROCESSES_VARIABLE

ERROR_FILE_VARIABLE = "TORCHELASTIC_ERROR_FILE"


@dataclass(frozen=True)
class RankReport:
    """Why a process failed.

    Attributes:
        message: one line.
        exit_code: with which it ended.
        is_consequence: it only lost another process, whose own report says why.
        at: seconds since 1970.
    """

    message: str
    exit_code: int
    is_consequence: bool
    at: float


def write_report(message: str, exit_code: int, *, is_consequence: bool) -> None:
    """Leave a report where the launcher, ours or torchrun, looks for it; without a launcher nothing is written."""
    target = os.environ.get(ERROR_FILE_VARIABLE)
    if not target:
        return
    now = time.time()
    extra = {"timestamp": str(int(now)), "at": now, "exit_code": exit_code, "is_consequence": is_consequence}
    path = Path(target)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        unfinished.write_text(json.dumps({"message": {"message": message, "extraInfo": extra}}), encoding="utf-8")
        os.replace(unfinished, path)
    except OSError:  # a full disk, say: then the launcher knows the exit code, and the line is on stderr
        print(f"mmattn: {message}", file=sys.stderr, flush=True)


def read_report(path: Path | str) -> RankReport | None:
    """The report in a file that `write_report` has written, or None where there is none."""
    try:
        message = json.loads(Path(path).read_text(encoding="utf-8"))["message"]
        extra = message["extraInfo"]
        return RankReport(message["message"], extra["exit_code"], extra["is_consequence"], extra["at"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def is_launched() -> bool:
    """Whether `mmattn train -n` started this process, and will say for all of them what went wrong."""
    return PROCESSES_VARIABLE in os.environ and "RANK" in os.environ and ERROR_FILE_VARIABLE in os.environ


def is_first() -> bool:
    """Whether this process speaks for all: the first of them, or the only one."""
    return os.environ.get("RANK", "0") == "0"
