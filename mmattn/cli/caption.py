"""`mmattn caption`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from mmattn.cli.options import BeamsOption, CompileOption, ImagesArgument, JsonOption, ModelOption


def caption(
    images: ImagesArgument,
    model: ModelOption,
    prompt: Annotated[str | None, typer.Option("--prompt", help="How the captions shall begin.")] = None,
    num_beams: BeamsOption = None,
    compile: CompileOption = False,
    json_lines: JsonOption = False,
) -> None:
    """Describe images."""
    import json

    from mmattn.cli.models import open_vlm

    settings: dict[str, Any] = {} if num_beams is None else {"num_beams": num_beams}
    captions = open_vlm(model, compile=compile).caption(images, prompt=prompt, **settings)
    for image, text in zip(images, captions, strict=True):
        print(json.dumps({"image": str(image), "caption": text}) if json_lines else f"{image}: {text}")
