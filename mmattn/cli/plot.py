"""`mmattn plot`."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated

import typer

from mmattn.cli.options import ForceOption


def plot(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Folders that training wrote.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="PNG", help="Where to.")] = Path("metrics.png"),
    metric: Annotated[
        list[str] | None, typer.Option("--metric", help="Draw only this one; repeatable. A wrong name lists all.")
    ] = None,
    force: ForceOption = False,
) -> None:
    """Compare runs: loss, learning rate, speed, scores."""
    from mmattn.errors import RunError, UsageError
    from mmattn.inference.files import check_new_file
    from mmattn.training.plot import choose_metrics, draw_runs, load_runs

    if output.suffix.lower() != ".png":
        raise UsageError(f"--output {output}: a PNG is drawn, so give a name that ends in .png")
    check_new_file(output, force=force)
    loaded = load_runs(runs)
    chosen, left_out = choose_metrics(loaded, metric or ())
    part = output.with_name(f"{output.name}.part.png")
    try:
        draw_runs(loaded, chosen, part)
        part.replace(output)
    except OSError as error:
        with contextlib.suppress(OSError):  # nothing can be deleted either where nothing can be written
            part.unlink(missing_ok=True)
        raise RunError(f"cannot write {output}: {error.strerror or error}") from error
    print(f"{output}: {', '.join(chosen)}")
    if left_out:
        print(f"not drawn without --metric: {', '.join(left_out)}")
