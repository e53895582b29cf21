"""One Markdown page from the rows that the parts wrote, the facts of the machine, and what failed."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import mmattn  # noqa: E402

PACKAGES = ("torch", "triton", "transformers", "diffusers", "accelerate")
HOW = """\
Written by `scripts/gpu_check.sh`. Do not edit: on a machine with a CUDA card run

    scripts/gpu_check.sh                  # training, tests, then every table below: under 10 minutes on an H100 or H200
    scripts/gpu_check.sh --quick          # the tests only; writes nothing
    MMATTN_PYTHON=/path/to/python scripts/gpu_check.sh --output gpu.md    # with what that Python has; installs nothing

Weights are random: sizes are the real ones, words and pictures mean nothing. Times of one table were taken in one
process, its variants in turn; ± is half the distance from the shortest to the longest. A dash: not measured, because
that kernel does not serve the call (flash and a mask), or because it would need too much memory.
"""


@dataclass(frozen=True)
class Outcome:
    """How a part ended: `error` is None when all was well."""

    part: str
    seconds: float
    error: str | None
    last_line: str


def read_rows(file: Path) -> dict[str, list[dict[str, Any]]]:
    """The rows of each table, in the order of their coming."""
    tables: dict[str, list[dict[str, Any]]] = {}
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        row = json.loads(line)
        tables.setdefault(row["table"], []).append(row["cells"])
    return tables


def page(tables: dict[str, list[dict[str, Any]]], outcomes: list[Outcome], date: str, device: str) -> str:
    """The whole page."""
    parts = [f"# Measured on a card\n\n{HOW}", table(machine(date, device))]
    done = [
        {
            "part": outcome.part,
            "result": "ok" if outcome.error is None else f"**failed: {outcome.error}**",
            "seconds": f"{outcome.seconds:.0f}",
            "last line": f"`{outcome.last_line}`",
        }
        for outcome in outcomes
    ]
    parts += ["## What was run\n", table(done)]
    for name, rows in tables.items():
        parts += [f"## {name}\n", table(rows)]
    return "\n".join(parts)


def machine(date: str, device: str) -> list[dict[str, str]]:
    """Card, driver and versions."""
    facts = {"date": date, "card": platform.processor() or platform.machine()}
    if device == "cuda":
        card = torch.cuda.get_device_properties(0)
        facts["card"] = (
            f"{card.name}, {card.total_memory / 2**30:.0f} GiB, {card.multi_processor_count} multiprocessors"
        )
        facts["driver"] = _driver()
        facts["CUDA, cuDNN of torch"] = f"{torch.version.cuda}, {torch.backends.cudnn.version()}"
    facts |= {"Python": platform.python_version(), "mmattn": mmattn.__version__}
    for package in PACKAGES:
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = "not installed"
    return [{"": name, "this machine": value} for name, value in facts.items()]


def _driver() -> str:
    file = Path("/proc/driver/nvidia/version")
    words = file.read_text(encoding="utf-8").split() if file.exists() else []
    return next((word for word in words if word[:1].isdigit() and word.count(".") >= 1), "unknown")


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, with the columns of all rows."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [columns, ["---"] * len(columns), *([row.get(name, "") for name in columns] for row in rows)]
    return "".join(_line(cells) for cells in lines)


def _line(cells: Iterable[Any]) -> str:
    return "| " + " | ".join(str(cell).replace("|", "/").replace("\n", " ") for cell in cells) + " |\n"
