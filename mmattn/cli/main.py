"""The `mmattn` command: registers the verbs and runs one of them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from mmattn import __version__
from mmattn.cli import (
    ask,
    caption,
    check,
    cp,
    demo,
    doctor,
    eval,
    export,
    generate,
    ls,
    maps,
    plot,
    show,
    swap,
    train,
    translate,
    ui,
)
from mmattn.cli.guard import run_guarded, split_debug
from mmattn.cli.options import OVERRIDES_CONTEXT

app = typer.Typer(
    name="mmattn",
    help="Train, score and use models with cross-attention.",
    epilog="\b\nFirst steps:\n  mmattn demo\n  mmattn cp vlm/finetune-blip my.yaml, edit it, mmattn train my.yaml",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command("ls")(ls.ls)
app.command("cp")(cp.cp)
app.command("show", context_settings=OVERRIDES_CONTEXT)(show.show)
app.command("check", context_settings=OVERRIDES_CONTEXT)(check.check)
app.command("train", context_settings=OVERRIDES_CONTEXT)(train.train)
app.command("eval", context_settings=OVERRIDES_CONTEXT)(eval.evaluate)
app.command("translate")(translate.translate)
app.command("caption")(caption.caption)
app.command("ask")(ask.ask)
app.command("generate")(generate.generate)
app.command("swap")(swap.swap)
app.command("maps")(maps.maps)
app.command("ui")(ui.ui)
app.command("plot")(plot.plot)
app.command("export", context_settings=OVERRIDES_CONTEXT)(export.export)
app.command("doctor")(doctor.doctor)
app.command("demo")(demo.demo)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Options before the verb; `main` reads `--debug` itself, so that it may also follow the verb."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code; without arguments it shows the help."""
    arguments, debug = split_debug(sys.argv[1:] if argv is None else argv)
    return run_guarded(lambda: app(arguments or ["--help"], prog_name="mmattn"), debug=debug)


if __name__ == "__main__":
    sys.exit(main())
