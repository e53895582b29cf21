"""`mmattn eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mmattn.cli.options import JsonOption, OverridesArgument


def evaluate(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A folder that training wrote.")],
    overrides: OverridesArgument = None,
    data: Annotated[
        str | None, typer.Option("--data", metavar="CONFIG", help="Score on this config's data, not the trained one's.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="JSONL", help="Write translations beside their references."),
    ] = None,
    json_lines: JsonOption = False,
) -> None:
    """Score a trained model on held-out data."""
    import json

    from mmattn.cli.recipe_main import evaluate_folder

    scores = evaluate_folder(folder, data, overrides or (), output)
    if json_lines:
        print(json.dumps(scores))
        return
    width = max(map(len, scores), default=0)
    for name, value in scores.items():
        print(f"{name:<{width}}  {value if isinstance(value, str) else f'{value:.4f}'}")
