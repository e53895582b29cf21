"""`mmattn cp`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mmattn.config.resolve import copy_config, list_launcher_configs


def cp(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A shipped config (`mmattn ls`).")],
    target: Annotated[Path, typer.Argument(metavar="FILE", help="The new file, or a folder for it.")] = Path(),
) -> None:
    """Copy a shipped config, to edit it."""
    path = copy_config(name, target)
    is_launcher = name in list_launcher_configs()
    then = f"accelerate launch --config_file {path} recipes/..." if is_launcher else f"mmattn train {path}"
    how = "" if is_launcher else f" (`mmattn show {path} --explain` says what each setting means)"
    print(f"wrote {path}: edit it{how}, then run `{then}`")
