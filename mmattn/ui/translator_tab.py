"""The tab of a translator: a translation, and which words of the source its words come from."""

from __future__ import annotations

from typing import Any

import gradio as gr

from mmattn.errors import UsageError
from mmattn.inference.translator import Translator
from mmattn.maps.record import AttentionMaps, record_attention
from mmattn.ui.handlers import MAPS_KEPT, message_line, on, still_there, written


def translator_tab(translator: Translator) -> None:
    """Lay out the tab, within `gr.Blocks`. Languages can be chosen where the model has several."""
    languages = list(translator.languages)
    has_source = translator.codes.kind == "token"
    with gr.Row():
        with gr.Column(min_width=320):
            text = gr.Textbox(label="Text", placeholder="The cat sleeps.", lines=4, max_lines=12)
            with gr.Row(visible=bool(languages)):
                source = gr.Dropdown(languages, value=None, label="From", visible=has_source, min_width=120)
                target = gr.Dropdown(languages, value=None, label="Into", min_width=120)
            go = gr.Button("Translate", variant="primary")
            said = gr.Textbox(label="Translation", interactive=False, lines=4, max_lines=12, elem_classes=["said"])
        with gr.Column(min_width=320):
            message = message_line()
            maps = gr.State(None, time_to_live=MAPS_KEPT)
            part = gr.Dropdown([], label="Part of the text", visible=False)
            picture = gr.Image(
                label="Alignment", show_label=False, format="png", interactive=False, visible=False,
                elem_classes=["map"], buttons=["download"],
            )  # fmt: skip
            pairs = gr.Textbox(label="Strongest source word of each word", interactive=False, visible=False, lines=2)
    work = _Work(translator)
    results = [said, maps, part, picture, pairs]
    inputs = [text, source, target]
    on([go.click, text.submit], work.translate, inputs, results, message, uses_model=True)
    on([part.input], draw_part, [maps, part], [picture, pairs], message)


class _Work:
    """What the tab's button does. It keeps nothing between calls."""

    def __init__(self, translator: Translator) -> None:
        self._translator = translator

    def translate(self, text: str, source: str | None, target: str | None) -> tuple[Any, ...]:
        """Translate, and draw the first part's alignment."""
        text = written(text, "text")
        kind = self._translator.codes.kind
        if (kind == "token" and not source) or (self._translator.languages and not target):
            raise UsageError(f"choose the language{'s' if kind == 'token' else ''} first")
        codes: dict[str, Any] = {"src_lang": source or None, "tgt_lang": target or None}
        with record_attention(self._translator) as maps:
            said = self._translator.translate(text, **codes)
        parts = [
            (f"{number + 1}: {_shortened(' '.join(pair.words))}", number) for number, pair in enumerate(maps.texts)
        ]
        choice = gr.Dropdown(choices=parts, value=0 if parts else None, visible=len(parts) > 1)
        return said, maps, choice, *draw_part(maps, 0)


def draw_part(maps: AttentionMaps | None, part: int) -> tuple[Any, Any]:
    """The matrix of one part (a line, or a sentence of a long one), and its pairs in words."""
    alignment = still_there(maps).alignment(part)
    pairs = ", ".join(f"{target} ← {source}" for source, target in alignment.words())
    return gr.Image(value=alignment.draw(), visible=True), gr.Textbox(pairs, visible=True)


def _shortened(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:39]}…"
