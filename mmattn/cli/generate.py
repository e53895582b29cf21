"""`mmattn generate`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmattn.cli.options import CompileOption, ForceOption, JsonOption, ModelOption
from mmattn.errors import UsageError

if TYPE_CHECKING:
    from PIL import Image

PromptsArgument = Annotated[list[str] | None, typer.Argument(metavar="PROMPT", help="What to draw.")]
FileOption = Annotated[Path | None, typer.Option("--file", "-f", metavar="TXT", help="Prompts, one a line.")]
OutputOption = Annotated[Path, typer.Option("--output", "-o", metavar="PATH", help="A folder, or FILE.png for one.")]
NegativeOption = Annotated[str | None, typer.Option("--negative", metavar="TEXT", help="What to lead away from.")]
StepsOption = Annotated[int, typer.Option("--steps", min=1, help="Steps of denoising.")]
GuidanceOption = Annotated[
    float | None,
    typer.Option("--guidance", min=0.0, help="Guidance scale, 1: off; the model's own by default.", show_default=False),
]
SeedOption = Annotated[int, typer.Option("--seed", min=0, help="Of the first picture.")]
NumOption = Annotated[int, typer.Option("--num-images", "-n", min=1, help="Of each prompt.")]
SizeOption = Annotated[str | None, typer.Option("--size", metavar="HxW", help="Height and width in pixels.")]
SchedulerOption = Annotated[
    str | None, typer.Option("--scheduler", metavar="NAME", help="ddim, dpm++, euler, euler-ancestral, unipc ...")
]
BatchOption = Annotated[int | None, typer.Option("--batch-size", min=1, help="Pictures drawn together.")]
LoraOption = Annotated[
    list[str] | None, typer.Option("--lora", metavar="FILE", help="LoRA file, FILE=0.7 for weaker; repeatable.")
]
KVOption = Annotated[
    Path | None, typer.Option("--kv", metavar="FOLDER", help="Folder of train_what=cross_attention_kv.")
]
GridOption = Annotated[Path | None, typer.Option("--grid", metavar="PNG", help="All of them on one, with captions.")]


def generate(
    model: ModelOption,
    prompts: PromptsArgument = None,
    file: FileOption = None,
    output: OutputOption = Path("."),
    negative: NegativeOption = None,
    steps: StepsOption = 25,
    guidance: GuidanceOption = None,
    seed: SeedOption = 0,
    num_images: NumOption = 1,
    size: SizeOption = None,
    scheduler: SchedulerOption = None,
    batch_size: BatchOption = None,
    lora: LoraOption = None,
    kv: KVOption = None,
    compile: CompileOption = False,
    grid: GridOption = None,
    force: ForceOption = False,
    json_lines: JsonOption = False,
) -> None:
    """Draw pictures from texts."""
    from mmattn.inference.diffusion.picture_files import check_paths, picture_paths

    texts = _prompts(prompts, file)
    height, width = (None, None) if size is None else _size(size)
    loras = [_lora(given) for given in lora or ()]
    of_picture = [text for text in texts for _ in range(num_images)]
    seeds = [seed + number for _ in texts for number in range(num_images)]
    paths = picture_paths(output, of_picture, seeds)
    check_paths(paths if grid is None else [*paths, _grid_path(grid, paths)], may_overwrite=force)

    from mmattn import __version__
    from mmattn.cli.models import open_text_to_image
    from mmattn.inference.diffusion.picture_files import save_picture

    t2i = open_text_to_image(model, scheduler, compile=compile)
    for name, scale in loras:
        t2i.load_lora(name, scale)
    if kv is not None:
        t2i.load_cross_attention_kv(kv)
    guidance = t2i.guidance_scale if guidance is None else guidance
    facts: dict[str, Any] = {"steps": steps, "guidance_scale": guidance, "model": model}
    facts |= {"scheduler": type(t2i.pipeline.scheduler).__name__, "mmattn": __version__}
    extras = {"negative_prompt": negative, "lora": ", ".join(lora or ()) or None, "kv": kv}
    facts |= {name: str(value) for name, value in extras.items() if value is not None}

    def save(start: int, images: list[Image.Image]) -> None:
        for number, image in enumerate(images, start):
            own = {"prompt": of_picture[number], "seed": seeds[number]}
            save_picture(image, paths[number], {**own, **facts})
            _say(paths[number], own, json_lines)

    images = t2i.generate(
        texts,
        negative_prompts=negative,
        num_inference_steps=steps,
        guidance_scale=guidance,
        num_images_per_prompt=num_images,
        height=height,
        width=width,
        seed=seed,
        batch_size=batch_size,
        on_batch=save,
    )
    if grid is not None:
        # A row for each prompt, where each has several pictures.
        columns = num_images if num_images > 1 and len(texts) > 1 else None
        _save_grid(grid, images, of_picture, facts, columns)


def _prompts(prompts: list[str] | None, file: Path | None) -> list[str]:
    if file is None:
        if not prompts:
            raise UsageError("no prompt: give one or several, or --file with one a line")
        return prompts
    if prompts:
        raise UsageError(f"--file {file}: prompts are given as well; leave one of them out")
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise UsageError(f"--file {file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"--file {file}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise UsageError(f"--file {file}: no prompt in it, all lines are blank")
    return found


def _size(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)x(\d+)", text.lower())
    if found is None:
        raise UsageError(f"--size {text}: give height and width in pixels, such as 512x768")
    return int(found[1]), int(found[2])


def _lora(text: str) -> tuple[str, float]:
    """`FILE`, or `FILE=SCALE`."""
    found = re.fullmatch(r"(.+)=([-+]?[0-9.]+)", text)
    if found is None or Path(text).exists():
        return text, 1.0
    try:
        return found[1], float(found[2])
    except ValueError as error:
        raise UsageError(f"--lora {text}: the scale after = is no number") from error


def _grid_path(grid: Path, pictures: list[Path]) -> Path:
    if grid.suffix.lower() != ".png":
        raise UsageError(f"--grid {grid}: must end in .png")
    if not grid.parent.is_dir():
        raise UsageError(f"--grid {grid}: the folder {grid.parent} does not exist; make it first")
    if grid.resolve() in [path.resolve() for path in pictures]:
        raise UsageError(f"--grid {grid}: is the file of a picture; choose another name")
    return grid


def _say(path: Path, own: dict[str, Any], json_lines: bool) -> None:
    import json

    print(json.dumps({"file": str(path), **own}, ensure_ascii=False) if json_lines else path, flush=True)


def _save_grid(
    grid: Path, images: list[Image.Image], labels: list[str], facts: dict[str, Any], columns: int | None
) -> None:
    import sys

    from mmattn.inference.diffusion.picture_files import save_picture
    from mmattn.inference.diffusion.picture_grid import picture_grid

    save_picture(picture_grid(images, labels, columns=columns), grid, facts)
    print(f"wrote {grid}", file=sys.stderr)
