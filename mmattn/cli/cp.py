"""`mmattn cp`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mmattn.config.resolve import copy_config


def cp(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A shipped config (`mmattn ls`).")],
    target: Annotated[Path, typer.Argument(metavar="FILE", help="The new file, or a folder for it.")] = Path(),
) -> None:
    """Copy a shipped config, to edit it."""
    path = copy_config(name, target)
    print(f"wrote {path}: edit it, then run `mmattn train {path}`")
