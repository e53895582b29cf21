"""`mmattn ask`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mmattn.cli.options import BeamsOption, JsonOption, ModelOption
from mmattn.errors import UsageError


def ask(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="An image file.")],
    questions: Annotated[list[str], typer.Argument(metavar="QUESTION", help="Questions about it.")],
    model: ModelOption,
    map_file: Annotated[
        Path | None, typer.Option("--map", metavar="PNG", help="Draw where the model looked for its answer.")
    ] = None,
    num_beams: BeamsOption = None,
    json_lines: JsonOption = False,
) -> None:
    """Answer questions about an image."""
    if map_file is not None and len(questions) != 1:
        raise UsageError(f"--map {map_file}: draws one answer, but {len(questions)} questions were given; ask one")
    import json

    from mmattn.inference.vlm import VisionLanguageModel

    vlm = VisionLanguageModel.from_pretrained(model)
    settings = {} if num_beams is None else {"num_beams": num_beams}
    pictures = vlm.encode([image])
    answers = vlm.ask(pictures, questions, **settings)
    for question, answer in zip(questions, answers, strict=True):
        print(json.dumps({"question": question, "answer": answer}) if json_lines else f"{question} {answer}")
