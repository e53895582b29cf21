"""`mmattn ask`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from mmattn.cli.options import BeamsOption, CompileOption, ForceOption, JsonOption, ModelOption
from mmattn.errors import UsageError


def ask(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="An image file.")],
    questions: Annotated[list[str], typer.Argument(metavar="QUESTION", help="Questions about it.")],
    model: ModelOption,
    map_file: Annotated[
        Path | None, typer.Option("--map", metavar="PNG", help="Draw where the model looked for its answer.")
    ] = None,
    word: Annotated[
        str | None, typer.Option("--word", help="With --map: where it looked for this word of question or answer.")
    ] = None,
    num_beams: BeamsOption = None,
    compile: CompileOption = False,
    force: ForceOption = False,
    json_lines: JsonOption = False,
) -> None:
    """Answer questions about an image."""
    _check_map(map_file, word, questions, force)

    import contextlib
    import json

    from mmattn.cli.models import open_vlm
    from mmattn.inference.files import new_file
    from mmattn.maps.record import record_attention

    vlm = open_vlm(model, compile=compile)
    settings: dict[str, Any] = {} if num_beams is None else {"num_beams": num_beams}
    with contextlib.nullcontext() if map_file is None else record_attention(vlm) as maps:
        answers = vlm.ask(image, questions, **settings)
    for question, answer in zip(questions, answers, strict=True):
        print(json.dumps({"question": question, "answer": answer}) if json_lines else f"{question} {answer}")
    if map_file is not None and maps is not None:
        drawn = maps.heatmap(word).draw()
        with new_file(map_file) as file:
            drawn.save(file, format="PNG")
        print(f"wrote {map_file}", file=sys.stderr)


def _check_map(map_file: Path | None, word: str | None, questions: list[str], force: bool) -> None:
    """Everything about `--map` that can be known before a model is opened."""
    if map_file is None:
        if word is not None:
            raise UsageError(f"--word {word}: needs --map PNG to draw on")
        if force:
            raise UsageError("--force: needs --map PNG, the file to overwrite")
        return
    if len(questions) != 1:
        raise UsageError(f"--map {map_file}: draws one answer, but {len(questions)} questions were given; ask one")
    if map_file.suffix.lower() != ".png":
        raise UsageError(f"--map {map_file}: must end in .png")
    from mmattn.inference.files import check_new_file

    check_new_file(map_file, force=force)
