"""What the benchmarks share: a step's row, facts about the machine, rows into a file, and the exit code."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch


@dataclass
class StepRow:
    """A step beside stock's: `value` is the ratio of medians, stock's time by ours."""

    name: str
    value: float
    goal: float
    stock_ms: float
    ours_ms: float
    stock_spread: float
    ours_spread: float
    difference: float
    backends: list[str] = field(default_factory=list)

    @property
    def is_ok(self) -> bool:
        """Whether the goal is reached."""
        return self.value >= self.goal


def facts(*modules: ModuleType, **more: Any) -> dict[str, Any]:
    """Versions, processor and threads, and whatever else should stand beside the figures."""
    return {
        "versions": {module.__name__: module.__version__ for module in modules},
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        **more,
    }


def finish(rows: list[Any], facts: dict[str, Any], file: Path | None) -> int:
    """Write rows (dataclasses with `is_ok`) and facts as JSON, where a file is named; 1 when a row is short."""
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        table = [{**asdict(row), "ok": row.is_ok} for row in rows]
        file.write_text(json.dumps({"rows": table, **facts}, indent=2) + "\n", encoding="utf-8")
    return 0 if all(row.is_ok for row in rows) else 1
