"""Arguments and options that several verbs share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ConfigArgument = Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML file, or a shipped name (`mmattn ls`).")]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY.PATH=VALUE", help="Values that override the file's."),
]
ModelOption = Annotated[str, typer.Option("--model", "-m", metavar="FOLDER", help="A trained folder, or a hub id.")]
BeamsOption = Annotated[int | None, typer.Option("--num-beams", min=1, help="Beams to search with; 1 is greedy.")]
SrcOption = Annotated[str | None, typer.Option("--src-lang", metavar="CODE", help="Language of the texts.")]
TgtOption = Annotated[str | None, typer.Option("--tgt-lang", metavar="CODE", help="Language to translate into.")]
CompileOption = Annotated[bool, typer.Option("--compile", help="Compile the step: pays for many results.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object a line.")]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint.")]
ResumeFromOption = Annotated[
    Path | None,
    typer.Option("--resume-from", metavar="FOLDER", help="In a new output_dir, from this checkpoint or run."),
]
ForceOption = Annotated[bool, typer.Option("--force", help="Overwrite files that are there.")]
ImagesArgument = Annotated[list[Path], typer.Argument(metavar="IMAGE", help="Image files.")]

# Lets `--training.lr=1` reach the config loader, whose error says how a value is set.
OVERRIDES_CONTEXT = {"ignore_unknown_options": True}
