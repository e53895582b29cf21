"""`mmattn demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def demo(
    output_dir: Annotated[
        Path, typer.Option("--output-dir", "-o", metavar="FOLDER", help="Where everything is written.")
    ] = Path("runs/demo"),
) -> None:
    """Train a small model in minutes and show what it can do.

    A vision-language model on drawn scenes, on a CPU: scores on pictures that it never saw, captions, answers, and a
    picture of where it looked.
    """
    from mmattn.config import load_recipe

    load_recipe("vlm").demo(output_dir)
