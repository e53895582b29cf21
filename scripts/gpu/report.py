"""One Markdown page from the rows that the parts wrote, the machines that they ran on, and what failed."""

from __future__ import annotations

import datetime
import json
import platform
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import mmattn  # noqa: E402

PACKAGES = ("torch", "triton", "transformers", "diffusers", "accelerate", "flash-attn")
HOW = """\
Written by `scripts/gpu_check.sh`. Do not edit: on a machine with a CUDA card run

    scripts/gpu_check.sh                  # tests, training, then every table below: 15 minutes at most
    scripts/gpu_check.sh --quick          # the tests only; writes nothing
    scripts/gpu_check.sh --part training --part tests --keep one    # some parts only, everything kept in a folder
    scripts/gpu_check.sh --join one --join two                      # this page from kept folders; needs no card
    scripts/gpu_check.sh --join one --join docs/gpu.json            # what `one` lacks as this page has it
    MMATTN_PYTHON=/path/to/python scripts/gpu_check.sh --output gpu.md    # with what that Python has; installs nothing

`gpu.json` beside this page has the same figures for programs. Weights are random: sizes are the real ones, words and
pictures mean nothing. Parts import, compile and load side by side; while one measures, all others are stopped. A part's
seconds are those in which it could run. Times of one table were taken in one process, its variants in turn; ± is half
the distance from the shortest to the longest. A dash: not measured, because that kernel does not serve the call (flash
and a mask), or because it would need too much memory. A part that was out of time has not failed: it was ended before
all was measured, and its rows so far are here. Of a run with other parts than those that are here the seconds are the
share of these, by what each part has taken.
"""
FILE = "run.json"


@dataclass(frozen=True)
class Outcome:
    """How a part ended.

    Attributes:
        error: what was wrong, None when all was well.
        failed: names of tests.
        is_out_of_time: that nothing has failed: the part was ended, or not begun, for want of time.
    """

    part: str
    seconds: float
    error: str | None
    last_line: str
    failed: list[str] = field(default_factory=list)
    is_out_of_time: bool = False

    @property
    def result(self) -> str:
        """In words."""
        return "ok" if self.error is None else f"{'out of time' if self.is_out_of_time else 'failed'}: {self.error}"


@dataclass
class Run:
    """One run of the script on one machine.

    Attributes:
        begun: date and time, UTC.
        machine: facts by name: card, driver, versions.
        outcomes: of its parts, in their order.
        seconds: from its beginning to its end, which is less than its parts have taken together: they run side by side.
        tables: part to its tables, each a list of rows; filled when it is read.
    """

    begun: str
    machine: dict[str, str]
    outcomes: list[Outcome]
    seconds: float = 0.0
    tables: dict[str, dict[str, list[dict[str, Any]]]] = field(default_factory=dict)

    @property
    def date(self) -> str:
        """Its day."""
        return self.begun[:10]

    @property
    def card(self) -> str:
        """Its name only."""
        return self.machine["card"].split(",")[0]

    def write(self, folder: Path) -> None:
        """Keep all but the rows, which the parts keep themselves."""
        content = {name: value for name, value in asdict(self).items() if name != "tables"}
        (folder / FILE).write_text(json.dumps(content, indent=1), encoding="utf-8")


def now() -> str:
    """Date and time, UTC."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def read_run(folder: Path) -> Run:
    """A run from its folder, rows and all."""
    content = json.loads((folder / FILE).read_text(encoding="utf-8"))
    outcomes = [Outcome(**each) for each in content["outcomes"]]
    tables = {outcome.part: read_rows(row_files(folder, outcome.part)) for outcome in outcomes}
    return Run(content["begun"], content["machine"], outcomes, content.get("seconds", 0.0), tables)


def read_runs(kept: Path) -> list[Run]:
    """The run that a folder keeps; or, of a page's JSON file, all of its runs with the parts that it has of them."""
    if kept.is_dir():
        return [read_run(kept)]
    content = json.loads(kept.read_text(encoding="utf-8"))
    runs = [Run(each["begun"], each["machine"], [], each.get("seconds", 0.0)) for each in content["runs"]]
    for part, facts in content["parts"].items():
        run = runs[facts.pop("run") - 1]
        run.outcomes.append(Outcome(**facts))
        run.tables[part] = content["tables"][part]
    return runs


def row_files(folder: Path, part: str) -> list[Path]:
    """Where a part has written its rows, those of several processes in their order."""
    return [*folder.glob(f"{part}.jsonl"), *sorted(folder.glob(f"{part}.*.jsonl"))]


def read_rows(files: Iterable[Path]) -> dict[str, list[dict[str, Any]]]:
    """The rows of each table, in the order of their coming; a last one that was cut off is left out."""
    tables: dict[str, list[dict[str, Any]]] = {}
    lines = [line for file in files for line in file.read_text(encoding="utf-8").splitlines(keepends=True)]
    for line in lines:
        if not line.endswith("\n"):
            continue
        row = json.loads(line)
        tables.setdefault(row["table"], []).append(row["cells"])
    return tables


def chosen(runs: list[Run], parts: list[str]) -> dict[str, tuple[int, Outcome]]:
    """For each part that was run the number of the run which the page takes it from, from 1: the latest in which all
    was well, else the one that has most rows, the latest of those that have as many."""
    kept: dict[str, tuple[int, Outcome]] = {}
    for part in parts:
        found = [
            ((outcome.error is None, _num_rows(run, outcome), run.begun), number, outcome)
            for number, run in enumerate(runs, start=1)
            for outcome in run.outcomes
            if outcome.part == part
        ]
        if found:
            _, number, outcome = max(found, key=lambda each: each[0])
            kept[part] = (number, outcome)
    return kept


def _num_rows(run: Run, outcome: Outcome) -> int:
    """Of a part that is not complete; all that are complete count alike."""
    return 0 if outcome.error is None else sum(map(len, run.tables[outcome.part].values()))


def shown(runs: list[Run], parts: list[str]) -> tuple[list[Run], dict[str, tuple[int, Outcome]]]:
    """Those of the runs that a part is taken from, and `chosen` of them."""
    used = {number for number, _ in chosen(runs, parts).values()}
    runs = [run for number, run in enumerate(runs, start=1) if number in used]
    return runs, chosen(runs, parts)


def sources(candidates: list[Run], runs: list[Run], kept: dict[str, tuple[int, Outcome]]) -> list[str]:
    """A line for each run of a page, with the parts that come from it; and one for each part of which a later run of
    the `candidates` is left out, because in that not all was well."""
    lines = []
    for number, run in enumerate(runs, start=1):
        parts = [
            part if outcome.error is None else f"{part} (not complete)"
            for part, (of, outcome) in kept.items()
            if of == number
        ]
        lines.append(f"run {number}, {_minute(run)}, {run.card}: {', '.join(parts)}")
    for part, (number, _) in kept.items():
        later = [
            (run, outcome)
            for run in candidates
            for outcome in run.outcomes
            if outcome.part == part and run.begun > runs[number - 1].begun
        ]
        lines += [f"left out: {part} of {_minute(run)}, {outcome.result}" for run, outcome in later]
    return lines


def _minute(run: Run) -> str:
    return run.begun[:16].replace("T", " ")


def page(runs: list[Run], kept: dict[str, tuple[int, Outcome]]) -> str:
    """The whole page."""
    parts = [f"# Measured on a card\n\n{HOW}", table(machines(runs, kept))]
    parts += ["## What was run\n", table(results(runs, kept))]
    failed = [name for _, outcome in kept.values() for name in outcome.failed]
    if failed:
        parts.append("Failed:\n\n" + "".join(f"- `{name}`\n" for name in failed))
    for part, (number, outcome) in kept.items():
        run = runs[number - 1]
        cut = "" if outcome.error is None else f"; **not complete: {outcome.error}**"
        for name, rows in run.tables[part].items():
            parts += [f"## {name}\n", f"Part `{part}`, run {number}, {run.card}{cut}.\n", table(rows)]
    return "\n".join(parts)


def results(runs: list[Run], kept: dict[str, tuple[int, Outcome]]) -> list[dict[str, Any]]:
    """A row for each part: where it was run, and how it ended."""
    return [
        {
            "part": outcome.part,
            "run": number,
            "card": runs[number - 1].card,
            "result": "ok" if outcome.error is None else f"**{outcome.result}**",
            "seconds": f"{outcome.seconds:.0f}",
            "last line": f"`{outcome.last_line}`" if outcome.last_line else "",
        }
        for number, outcome in kept.values()
    ]


def table_data(runs: list[Run], kept: dict[str, tuple[int, Outcome]]) -> str:
    """The page for programs: runs, parts and tables as JSON."""
    content = {
        "runs": [
            {"begun": run.begun, "seconds": seconds_of(run, number, kept), "machine": run.machine}
            for number, run in enumerate(runs, start=1)
        ],
        "parts": {part: {"run": number, **asdict(outcome)} for part, (number, outcome) in kept.items()},
        "tables": {part: runs[number - 1].tables[part] for part, (number, _) in kept.items()},
    }
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def seconds_of(run: Run, number: int, kept: dict[str, tuple[int, Outcome]]) -> float:
    """Of a run's seconds the share of those of its parts that the page has, by what each part has taken."""
    here = sum(outcome.seconds for of, outcome in kept.values() if of == number)
    in_all = sum(outcome.seconds for outcome in run.outcomes)
    return run.seconds * here / in_all if in_all else run.seconds


def machines(runs: list[Run], kept: dict[str, tuple[int, Outcome]]) -> list[dict[str, str]]:
    """A row for each fact, a column for each run."""
    names = list(dict.fromkeys(name for run in runs for name in run.machine))
    heads = [f"run {number}" for number in range(1, len(runs) + 1)]
    rows = [("begun, UTC", [_minute(run) for run in runs])]
    seconds = [seconds_of(run, number, kept) for number, run in enumerate(runs, start=1)]
    rows.append(("seconds, its parts here", [f"{each:.0f}" if each else "-" for each in seconds]))
    rows += [(name, [run.machine.get(name, "-") for run in runs]) for name in names]
    return [{"": name, **dict(zip(heads, values, strict=True))} for name, values in rows]


def machine(device: str) -> dict[str, str]:
    """Card, driver and versions of this machine."""
    facts = {"card": platform.processor() or platform.machine()}
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
    return facts


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
