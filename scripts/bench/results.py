"""What the benchmarks share: their rows into a file, and the exit code."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any


def finish(rows: list[Any], facts: dict[str, Any], file: Path | None) -> int:
    """Write rows (dataclasses with `is_ok`) and facts as JSON, where a file is named; 1 when a row is short."""
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        table = [{**asdict(row), "ok": row.is_ok} for row in rows]
        file.write_text(json.dumps({"rows": table, **facts}, indent=2) + "\n", encoding="utf-8")
    return 0 if all(row.is_ok for row in rows) else 1
