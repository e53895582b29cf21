"""`mmattn maps`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmattn.cli.kinds import Kind, kind_of_model
from mmattn.cli.options import ForceOption, JsonOption, ModelOption, SrcOption, TgtOption
from mmattn.errors import UsageError

if TYPE_CHECKING:
    from mmattn.maps.record import AttentionMaps

_OUTPUT, _STEPS = "maps.png", 25
TextArgument = Annotated[str | None, typer.Argument(metavar="TEXT", help="Prompt, source text, or question.")]
ImageOption = Annotated[Path | None, typer.Option("--image", metavar="FILE", help="Picture to look at.")]
WordOption = Annotated[list[str] | None, typer.Option("--word", "-w", help="Draw only this word; repeatable.")]
OutputOption = Annotated[
    Path | None, typer.Option("--output", "-o", metavar="PNG", help=f"Where to.  [default: {_OUTPUT}]")
]
SaveOption = Annotated[Path | None, typer.Option("--save", metavar="NPZ", help="Write the weights too.")]
LayerOption = Annotated[list[str] | None, typer.Option("--layer", help="Number or part of a name; repeatable.")]
HeadOption = Annotated[list[int] | None, typer.Option("--head", help="Only this head; repeatable.")]
StepsOption = Annotated[int | None, typer.Option("--steps", min=1, help=f"Steps of denoising.  [default: {_STEPS}]")]
SeedOption = Annotated[int | None, typer.Option("--seed", min=0, help="Of the picture that is drawn.  [default: 0]")]
ScoreOption = Annotated[int | None, typer.Option("--score", min=2, metavar="N", help="Score maps on so many scenes.")]


def maps(
    model: ModelOption,
    text: TextArgument = None,
    image: ImageOption = None,
    word: WordOption = None,
    output: OutputOption = None,
    save: SaveOption = None,
    layer: LayerOption = None,
    head: HeadOption = None,
    steps: StepsOption = None,
    seed: SeedOption = None,
    src_lang: SrcOption = None,
    tgt_lang: TgtOption = None,
    score: ScoreOption = None,
    force: ForceOption = False,
    json_lines: JsonOption = False,
) -> None:
    """Show which words look where: in a picture, or in a source text."""
    flags = {"TEXT": text, "--image": image, "--word": word, "--layer": layer, "--head": head, "--steps": steps}
    flags |= {
        "--seed": seed,
        "--src-lang": src_lang,
        "--tgt-lang": tgt_lang,
        "--output": output,
        "--save": save,
        "--force": force or None,
    }
    given = {name: value for name, value in flags.items() if value is not None}
    if score is not None:
        if given:
            raise UsageError(f"--score {score}: scores scenes and draws nothing; leave out {', '.join(given)}")
        _print_scores(_scores(model, score), json_lines)
        return
    from mmattn.inference.files import new_file

    output = output or Path(_OUTPUT)
    _check_files(output, save, force)
    kind = kind_of_model(model)
    _check_input(kind, given)
    chosen: dict[str, Any] = {"layers": [int(one) if one.isdecimal() else one for one in layer] if layer else None}
    chosen |= {"heads": head or None}
    drawing = {"num_inference_steps": steps or _STEPS, "seed": seed or 0}
    languages = {"src_lang": src_lang, "tgt_lang": tgt_lang}
    recorded, said = _record(kind, model, text, image, chosen, drawing if kind == "diffusion" else languages)
    if kind == "translator":
        from mmattn.maps.draw import stacked

        # A translation has a part for each line, and for each piece of a line that is too long.
        drawn = stacked([recorded.alignment(number).draw() for number in range(max(1, len(recorded)))])
    else:
        drawn = recorded.grid(word).draw()
    with new_file(output) as file:
        drawn.save(file, format="PNG")
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
        if path is not None:
            check_new_file(path, force=force)


# What an option is for, by the kinds of model that it means something for.
_FOR = {
    "--image": (("vlm",), "looks at no pictures"),
    "--word": (("vlm", "diffusion"), "has the alignment of all words drawn"),
    "--steps": (("diffusion",), "draws no pictures"),
    "--seed": (("diffusion",), "draws no pictures"),
    "--src-lang": (("translator",), "does not translate"),
    "--tgt-lang": (("translator",), "does not translate"),
}


def _check_input(kind: Kind, given: dict[str, Any]) -> None:
    for name, (kinds, reason) in _FOR.items():
        if name in given and kind not in kinds:
            value = given[name]
            shown = " ".join(map(str, value)) if isinstance(value, list) else value
            raise UsageError(f"{name} {shown}: this model ({kind}) {reason}; leave it out")
    if kind == "vlm" and "--image" not in given:
        raise UsageError("this model looks at pictures: give one with --image")
    if kind != "vlm" and "TEXT" not in given:
        raise UsageError(f"no text: give {'a prompt' if kind == 'diffusion' else 'a text to translate'}")


def _record(
    kind: Kind, model: str, text: str | None, image: Path | None, chosen: dict[str, Any], arguments: dict[str, Any]
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
            said = translator.translate(text, **arguments)
        return recorded, said
    t2i = open_text_to_image(model)
    with record_attention(t2i, **chosen) as recorded:
        t2i.generate(text, **arguments)
    return recorded, text


def _scores(model: str, count: int) -> dict[str, Any]:
    from mmattn.cli.models import open_text_to_image, open_translator, open_vlm

    kind = kind_of_model(model)
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
    where = ", ".join(map(str, spots))
    return {**scores, "maps/chosen": f"{where}; above {threshold:.0%}"}


def _print_scores(scores: dict[str, Any], json_lines: bool) -> None:
    import json

    if json_lines:
        print(json.dumps(scores))
        return
    width = max(map(len, scores))
    for name, value in scores.items():
        print(f"{name:<{width}}  {value if isinstance(value, str) else f'{value:.4f}'}")
