"""`mmattn maps`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from mmattn.cli.options import JsonOption, ModelOption
from mmattn.errors import UsageError

if TYPE_CHECKING:
    from mmattn.maps.record import AttentionMaps

Kind = Literal["translator", "vlm", "diffusion"]
TextArgument = Annotated[str | None, typer.Argument(metavar="TEXT", help="Prompt, source text, or question.")]
ImageOption = Annotated[Path | None, typer.Option("--image", metavar="FILE", help="Picture to look at.")]
WordOption = Annotated[list[str] | None, typer.Option("--word", "-w", help="Draw only this word; repeatable.")]
OutputOption = Annotated[Path, typer.Option("--output", "-o", metavar="PNG", help="Where to.")]
SaveOption = Annotated[Path | None, typer.Option("--save", metavar="NPZ", help="Write the weights too.")]
LayerOption = Annotated[list[str] | None, typer.Option("--layer", help="Number or part of a name; repeatable.")]
HeadOption = Annotated[list[int] | None, typer.Option("--head", help="Only this head; repeatable.")]
StepsOption = Annotated[int, typer.Option("--steps", min=1, help="Steps of denoising.")]
SeedOption = Annotated[int, typer.Option("--seed", min=0, help="Of the picture that is drawn.")]
ScoreOption = Annotated[int | None, typer.Option("--score", min=2, metavar="N", help="Score maps on so many scenes.")]


def maps(
    model: ModelOption,
    text: TextArgument = None,
    image: ImageOption = None,
    word: WordOption = None,
    output: OutputOption = Path("maps.png"),
    save: SaveOption = None,
    layer: LayerOption = None,
    head: HeadOption = None,
    steps: StepsOption = 25,
    seed: SeedOption = 0,
    score: ScoreOption = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite files that are there.")] = False,
    json_lines: JsonOption = False,
) -> None:
    """Show which words look where: in a picture, or in a source text."""
    if score is not None:
        drawing = {"TEXT": text, "--image": image, "--word": word, "--save": save, "--layer": layer, "--head": head}
        given = [name for name, value in drawing.items() if value]
        if given:
            raise UsageError(f"--score {score}: scores scenes and draws nothing; leave out {', '.join(given)}")
        _print_scores(_scores(model, score), json_lines)
        return
    _check_files(output, save, force)
    kind = _kind(model)
    _check_input(kind, text, image, word)
    chosen: dict[str, Any] = {"layers": [int(one) if one.isdigit() else one for one in layer] if layer else None}
    chosen |= {"heads": head or None}
    recorded, said = _record(kind, model, text, image, chosen, steps, seed)
    picture = recorded.alignment() if kind == "translator" else recorded.grid(word)
    picture.save(output)
    if save is not None:
        recorded.save(save)
    if json_lines:
        import json

        print(json.dumps({"file": str(output), "text": said}, ensure_ascii=False))
    else:
        print(said)
    print(f"wrote {output}{'' if save is None else f' and {save}'}", file=sys.stderr)


def _check_files(output: Path, save: Path | None, force: bool) -> None:
    """Everything about the files that can be known before a model is opened."""
    from mmattn.inference.files import check_new_file

    if output.suffix.lower() != ".png":
        raise UsageError(f"--output {output}: must end in .png")
    if save is not None and save.suffix != ".npz":
        raise UsageError(f"--save {save}: must end in .npz")
    for path in (output, save):
        if path is not None and not (force and path.is_file()):
            check_new_file(path)


def _kind(model: str) -> Kind:
    """What a folder holds; a hub id's files are asked for."""
    from mmattn.cli.stock_models import PIPELINE, model_facts
    from mmattn.inference.trained import model_source

    facts, file = model_facts(str(model_source(model)))
    if file == PIPELINE:
        return "diffusion"
    is_vlm = "vision_config" in facts or "image" in facts
    return "vlm" if is_vlm else "translator"


def _check_input(kind: Kind, text: str | None, image: Path | None, word: list[str] | None) -> None:
    if kind == "vlm":
        if image is None:
            raise UsageError("this model looks at pictures: give one with --image")
    elif image is not None:
        raise UsageError(f"--image {image}: this model ({kind}) looks at no pictures; leave it out")
    elif text is None:
        raise UsageError(f"no text: give {'a prompt' if kind == 'diffusion' else 'a text to translate'}")
    if kind == "translator" and word:
        raise UsageError("--word is for pictures; of a translation the alignment of all words is drawn")


def _record(
    kind: Kind, model: str, text: str | None, image: Path | None, chosen: dict[str, Any], steps: int, seed: int
) -> tuple[AttentionMaps, str]:
    """Run the model once: what was recorded, and what it said."""
    from mmattn.cli.models import open_text_to_image, open_translator, open_vlm
    from mmattn.maps.record import record_attention

    if kind == "vlm":
        assert image is not None
        vlm = open_vlm(model)
        with record_attention(vlm, **chosen) as recorded:
            said = vlm.caption(image) if text is None else vlm.ask(image, text)
        return recorded, said
    assert text is not None
    if kind == "translator":
        translator = open_translator(model)
        with record_attention(translator, **chosen) as recorded:
            said = translator.translate(text)
        return recorded, said
    t2i = open_text_to_image(model)
    with record_attention(t2i, **chosen) as recorded:
        t2i.generate(text, num_inference_steps=steps, seed=seed)
    return recorded, text


def _scores(model: str, count: int) -> dict[str, Any]:
    from mmattn.cli.models import open_text_to_image, open_translator, open_vlm

    kind = _kind(model)
    if kind == "translator":
        from mmattn.inference.map_scores import translation_scores

        return translation_scores(open_translator(model), count)
    from mmattn.data.scenes import SceneDataset
    from mmattn.inference.map_scores import caption_maps, scored_scenes

    tuning = max(2, count // 2)
    if kind == "vlm":
        vlm = open_vlm(model)
        source = SceneDataset("test", size=count + tuning)
        scores, spots, threshold = scored_scenes(lambda numbers: caption_maps(vlm, source, numbers), count, tuning)
    else:
        from mmattn.inference.diffusion.scene_maps import scene_maps

        t2i = open_text_to_image(model)
        source = SceneDataset("test", size=count + tuning, image_size=t2i.size[0])
        scores, spots, threshold = scored_scenes(lambda numbers: scene_maps(t2i, source, numbers), count, tuning)
    where = ", ".join(f"layer {layer} head {head}" for layer, head in spots)
    return {**scores, "maps/chosen": f"{where}; above {threshold:.0%}"}


def _print_scores(scores: dict[str, Any], json_lines: bool) -> None:
    import json

    if json_lines:
        print(json.dumps(scores))
        return
    width = max(map(len, scores))
    for name, value in scores.items():
        print(f"{name:<{width}}  {value if isinstance(value, str) else f'{value:.4f}'}")
