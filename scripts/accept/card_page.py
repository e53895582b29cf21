"""The figures of a card: of this machine's, measured now, else those that were committed with docs/gpu.md."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from typing import Any

from lines import BIN, ROOT, RUNS, report, run

COMMITTED = ROOT / "docs" / "gpu.json"
Row = dict[str, Any]


@dataclass(frozen=True)
class CardPage:
    """What docs/gpu.json has.

    Attributes:
        runs: date, seconds and machine of each run.
        parts: how each part ended, and in which run, from 1.
        tables: part to its tables, each a list of rows.
    """

    runs: list[dict[str, Any]]
    parts: dict[str, dict[str, Any]]
    tables: dict[str, dict[str, list[Row]]]

    def where(self, part: str) -> str:
        """Day and card of a part, short enough for a line."""
        if part not in self.parts:
            return "not measured"
        of = self.runs[self.parts[part]["run"] - 1]
        card = of["machine"]["card"].split(",")[0].removeprefix("NVIDIA ")
        return f"{of['begun'][:10]}, {card}"

    @property
    def seconds(self) -> float:
        """Of all runs that parts come from, by the clock; of one that does not say it, what its parts took."""
        by_run: dict[int, float] = {}
        for part in self.parts.values():
            by_run[part["run"]] = by_run.get(part["run"], 0.0) + part["seconds"]
        return sum(self.runs[run - 1].get("seconds") or of_parts for run, of_parts in by_run.items())

    def rows(self, part: str, *columns: str) -> list[Row]:
        """The rows of a part that have all these columns."""
        tables = self.tables.get(part, {}).values()
        return [row for rows in tables for row in rows if all(column in row for column in columns)]


@functools.cache
def card_page() -> CardPage | None:
    """Measured now where there is a card, else read; None where there is neither."""
    file = RUNS / "gpu" / "page.json"
    if has_card():
        file.unlink(missing_ok=True)
        command = ["bash", "scripts/gpu_check.sh", "--keep", file.parent, "--output", file.with_suffix(".md")]
        code, seconds, _ = run(command, RUNS / "gpu.log", MMATTN_PYTHON=str(BIN / "python"))
        report("3 scripts/gpu_check.sh on this card", f"{seconds / 60:.1f} min", "15 min", seconds <= 15 * 60)
        report("3 scripts/gpu_check.sh on this card", f"exit code {code}", "0", code == 0)
    else:
        file = COMMITTED
    if not file.is_file():
        return None
    content = json.loads(file.read_text(encoding="utf-8"))
    return CardPage(content["runs"], content["parts"], content["tables"])


def has_card() -> bool:
    """Is there a CUDA card?"""
    code, _, _ = run([BIN / "python", "-c", "import torch; assert torch.cuda.is_available()"], RUNS / "has_card.log")
    return code == 0


def number(cell: Any) -> float:
    """The first number of a cell such as "1.23 ±4%"; NaN where it has none, so that no goal is met."""
    try:
        return float(str(cell).replace(",", "").split()[0].removesuffix("x"))
    except (ValueError, IndexError):
        return float("nan")
