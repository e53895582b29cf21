"""The tab of a text-to-image pipeline: draw, steer, see which places looked at a word."""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import gradio as gr
from PIL import Image

from mmattn.errors import UsageError
from mmattn.inference.text_to_image import TextToImage
from mmattn.maps.edits import PromptEdit
from mmattn.maps.record import AttentionMaps, record_attention
from mmattn.maps.steer import steer_attention
from mmattn.ui.handlers import message_line, on, written
from mmattn.ui.steering import draw_regions, read_regions, read_weights, region_line
from mmattn.ui.word_map import WordMap

_MOST_STEPS = 100
_KINDS = [("swap words one for one", "replace"), ("add or drop words", "refine")]


class _Fields(NamedTuple):
    """What a visitor may fill in."""

    prompt: Any
    steps: Any
    guidance: Any
    seed: Any
    weights: Any
    regions: Any
    share: Any
    edited: Any
    kind: Any
    compares: Any


def text_to_image_tab(t2i: TextToImage) -> None:
    """Lay out the tab, within `gr.Blocks`."""
    with gr.Row():
        with gr.Column(min_width=320):
            prompt = gr.Textbox(label="Prompt", placeholder="a red circle left of a blue square", lines=2, max_lines=5)
            with gr.Row():
                steps = gr.Slider(1, _MOST_STEPS, value=25, step=1, label="Steps", min_width=140)
                guidance = guidance_slider(t2i.guidance_scale)
                seed = gr.Number(0, label="Seed", precision=0, minimum=0, min_width=100)
            go = gr.Button("Generate", variant="primary")
            with gr.Accordion("Steer", open=False):
                steering = _steering_fields(t2i)
        with gr.Column(min_width=320):
            message = message_line()
            with gr.Row():
                picture = _drawn("Picture", visible=True)
                other = _drawn("Without steering", visible=False)
            word_map = WordMap(message, "Places that looked at a word", has_heads=False)
    fields = _Fields(prompt, steps, guidance, seed, *steering)
    work = _Work(t2i, word_map)
    results = [picture, other, *word_map.outputs]
    on([go.click, prompt.submit], work.generate, fields, results, message, uses_model=True)


def guidance_slider(own: float) -> gr.Slider:
    """A field that begins with the model's own scale, whatever that is; 0 turns guidance off as 1 does."""
    value = max(1.0, own)
    step = 0.5 if value % 0.5 == 0 else 0.01
    return gr.Slider(1, max(20.0, value), value=value, step=step, label="Guidance (1: off)", min_width=140)


def _drawn(label: str, *, visible: bool) -> gr.Image:
    return gr.Image(
        label=label, format="png", interactive=False, visible=visible, height=320, min_width=150,
        elem_classes=["drawn"], buttons=["download"],
    )  # fmt: skip


def _steering_fields(t2i: TextToImage) -> tuple[Any, ...]:
    """The fields from `weights` on, with the field on which boxes are drawn by two clicks."""
    weights = gr.Textbox(label="Weights of words, one a line", placeholder="red = 1.6", lines=2, max_lines=6)
    regions = gr.Textbox(
        label="Regions of phrases, one a line: left, top, right, bottom",
        placeholder="a red circle = 0, 0, 0.5, 1", lines=2, max_lines=6,
    )  # fmt: skip
    with gr.Row():
        with gr.Column(min_width=150):
            phrase = gr.Textbox(label="Phrase of the next region", placeholder="a red circle")
            gr.Markdown("Write a phrase, then click two corners of its box on the field.")
        field = gr.Image(
            draw_regions({}, t2i.size, None), label="Regions", show_label=False, interactive=False, format="png",
            height=240, min_width=150, buttons=[], elem_classes=["field"],
        )  # fmt: skip
    share = gr.Slider(0.05, 1, value=0.4, step=0.05, label="Share of the steps in which they count")
    edited = gr.Textbox(label="Edited prompt, drawn with the maps of the prompt", placeholder="a blue circle ...")
    kind = gr.Dropdown(_KINDS, value="replace", label="The edit")
    compares = gr.Checkbox(True, label="Draw it without steering too")
    message = message_line()
    corner = gr.State(None)
    drawing = _Regions(t2i.size)
    on([field.select], drawing.click, [phrase, regions, corner], [regions, corner, field], message)
    on([regions.change], drawing.draw, [regions, corner], [field], message)
    return weights, regions, share, edited, kind, compares


class _Regions:
    """The field on which regions are drawn.

    Args:
        size: height and width of the pictures.
    """

    def __init__(self, size: tuple[int, int]) -> None:
        self._size = size

    def draw(self, regions: str, corner: tuple[float, float] | None) -> tuple[Any, ...]:
        """Show what is written."""
        return (draw_regions(read_regions(regions), self._size, corner),)

    def click(
        self, place: gr.SelectData, phrase: str, regions: str, corner: tuple[float, float] | None
    ) -> tuple[Any, ...]:
        """Two clicks make a box; the first one is kept in the session."""
        phrase = written(phrase, "phrase of the next region")
        boxes = read_regions(regions)
        if phrase in boxes:
            raise UsageError(f"regions: {phrase!r} is there already; change its line, or write another phrase")
        width, height = draw_regions({}, self._size, None).size
        here = place.index[0] / width, place.index[1] / height
        if corner is None:
            return regions, here, draw_regions(boxes, self._size, here)
        lines = "\n".join([*filter(None, [(regions or "").rstrip()]), region_line(phrase, corner, here)])
        return lines, None, draw_regions(read_regions(lines), self._size, None)


class _Work:
    """What the tab's button does. It keeps nothing between calls."""

    def __init__(self, t2i: TextToImage, word_map: WordMap) -> None:
        self._t2i, self._word_map = t2i, word_map

    def generate(self, *given: Any) -> tuple[Any, ...]:
        """Draw, with what steers it; and beside it the picture without, or the one that was edited."""
        fields = _Fields(*given)
        prompt = written(fields.prompt, "prompt")
        if fields.seed is None:
            raise UsageError("seed: give a whole number of 0 or more")
        asked = {"num_inference_steps": int(fields.steps), "guidance_scale": fields.guidance, "seed": int(fields.seed)}
        weights, regions = read_weights(fields.weights), read_regions(fields.regions)
        edited = (fields.edited or "").strip()
        if edited:
            prompts: Any = [prompt, written(edited, "edited prompt")]
            steering = steer_attention(
                self._t2i, weights=weights or None, regions=regions or None, edit=PromptEdit(fields.kind)
            )
        else:
            prompts, steering = prompt, self._weighted(weights, regions, fields.share)
        with record_attention(self._t2i) as maps, steering:
            images = self._t2i.generate(prompts, **asked)
        if edited:
            return self._shown(images[1], "Edited prompt", images[0], "Prompt", maps)
        is_steered = bool(weights or regions)
        plain = self._t2i.generate(prompt, **asked)[0] if is_steered and fields.compares else None
        return self._shown(images[0], "Steered" if is_steered else "Picture", plain, "Without steering", maps)

    def _weighted(self, weights: dict[str, float], regions: dict[str, Any], share: float) -> Any:
        if not weights and not regions:
            return contextlib.nullcontext()
        return steer_attention(self._t2i, weights=weights or None, regions=regions or None, steps=share)

    def _shown(
        self, image: Image.Image, label: str, other: Image.Image | None, other_label: str, maps: AttentionMaps
    ) -> tuple[Any, ...]:
        return (
            gr.Image(value=image, label=label),
            gr.Image(value=other, label=other_label, visible=other is not None),
            *self._word_map.show(maps),
        )
