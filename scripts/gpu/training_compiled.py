"""Each recipe as in training.py with training.torch_compile: 60 steps without a break, the last 40 counted."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from measure import Options, read_options
from training import figures, launch, rows, run, tail

STEPS, TINY_STEPS = 60, 12
LIMIT_S = 150.0  # for a recipe, on a card; compiling takes most of it


def measured(recipe: str, folder: Path, steps: int, options: Options) -> dict[str, Any]:
    """Run a recipe to its end."""
    end = time.monotonic() + (LIMIT_S if options.device == "cuda" else 900.0)
    if (code := run(launch(recipe, folder, steps, options, is_compiled=True), folder, end, None)) != 0:
        raise RuntimeError(f"exit code {code}: {tail(folder)}")
    return figures(folder, steps, steps // 3, options)


def main() -> int:
    """The table."""
    options = read_options(__doc__)
    steps = TINY_STEPS if options.tiny else STEPS
    table = f"Training with torch_compile, {'bf16' if options.device == 'cuda' else 'float32'}, {steps} steps"
    return rows(table, lambda recipe, folder: measured(recipe, folder, steps, options), options)


if __name__ == "__main__":
    sys.exit(main())
