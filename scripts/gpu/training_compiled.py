"""Each recipe as in training.py with training.torch_compile: 60 steps without a break, the last 40 or so counted."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from measure import Options, read_options
from training import LIMIT_ON_CPU_S, SIZES, Clock, figures, launch, rows, running, timed

STEPS, TINY_STEPS = 60, 12
LIMIT_S = 300.0  # for a recipe, on a card, while it may run; compiling takes most of it


def measured(recipe: str, folder: Path, steps: int, options: Options) -> dict[str, Any]:
    """Run a recipe to its last step, without what it saves then; its first third, which compiles, beside whatever else
    there is."""
    clock = Clock(LIMIT_S if options.device == "cuda" else LIMIT_ON_CPU_S)
    with running(launch(recipe, folder, steps, options, torch_compile=True, save_every=0)) as process:
        counted = timed(process, folder, clock, steps // 3, steps, options)
    return figures(folder, steps, counted, options)


def main() -> int:
    """The table."""
    options = read_options(__doc__, list(SIZES))
    steps = TINY_STEPS if options.tiny else STEPS
    table = f"Training with torch_compile, {'bf16' if options.device == 'cuda' else 'float32'}, {steps} steps"
    return rows(table, lambda recipe, folder: measured(recipe, folder, steps, options), options)


if __name__ == "__main__":
    sys.exit(main())
