"""The tab of a vision-language model: drop a picture, get a caption, ask, see where it looked."""

from __future__ import annotations

from typing import Any

import gradio as gr

from mmattn.inference.vlm import VisionLanguageModel
from mmattn.maps.record import record_attention
from mmattn.models.vlm import CaptioningNetwork, MatchingNetwork, QuestionAnsweringNetwork
from mmattn.models.vlm.blip import is_blip
from mmattn.ui.handlers import message_line, on, written
from mmattn.ui.pictures import open_upload, picture_input
from mmattn.ui.word_map import WordMap

_SHOWN = (1024, 1024)  # pixels of a picture as the page shows it


def vlm_tab(vlm: VisionLanguageModel) -> None:
    """Lay out the tab, within `gr.Blocks`. What the checkpoint cannot do is left out."""
    network = vlm.network
    is_captioning = isinstance(network, CaptioningNetwork)
    answers = isinstance(network, QuestionAnsweringNetwork) or (is_captioning and not is_blip(network.config))
    with gr.Row():
        with gr.Column(min_width=320):
            picture = picture_input()
            preview = gr.Image(
                label="Picture",
                height=320,
                interactive=False,
                visible=False,
                format="png",
                elem_classes=["preview"],
                buttons=[],
            )
            caption = gr.Button("Caption", variant="primary", visible=is_captioning)
            with gr.Group(visible=answers):
                question = gr.Textbox(label="Question", placeholder="What colour is the circle?", max_lines=3)
                ask = gr.Button("Ask")
            with gr.Group(visible=isinstance(network, MatchingNetwork)):
                text = gr.Textbox(label="Text", placeholder="a cat on a chair", max_lines=3)
                match = gr.Button("Match")
        with gr.Column(min_width=320):
            message = message_line()
            said = gr.Textbox(label="The model says", interactive=False, elem_classes=["said"], lines=2)
            word_map = WordMap(message, "Where it looked for a word", has_heads=True)
    work = _Work(vlm, word_map)
    results = [said, *word_map.outputs]
    on(
        [picture.upload, picture.clear],
        work.check,
        [picture],
        [picture, preview, *results],
        message,
        otherwise=work.nothing,
    )
    on([caption.click], work.caption, [picture], results, message, uses_model=True)
    on([ask.click, question.submit], work.ask, [picture, question], results, message, uses_model=True)
    on([match.click, text.submit], work.match, [picture, text], results, message, uses_model=True)


class _Work:
    """What the tab's buttons do. It keeps nothing between calls."""

    def __init__(self, vlm: VisionLanguageModel, word_map: WordMap) -> None:
        self._vlm, self._word_map = vlm, word_map

    def check(self, file: str | None) -> tuple[Any, ...]:
        """A new picture, or none: what was said of the one before goes."""
        if file is None:
            return self.nothing()
        image = open_upload(file)
        image.thumbnail(_SHOWN)
        return gr.skip(), gr.Image(value=image, visible=True), *self.nothing()[2:]

    def nothing(self) -> tuple[Any, ...]:
        """No picture, and nothing said."""
        return None, gr.Image(value=None, visible=False), "", *self._word_map.clear()

    def caption(self, file: str | None) -> tuple[Any, ...]:
        """Describe the picture."""
        image = open_upload(file)
        with record_attention(self._vlm) as maps:
            said = self._vlm.caption(image)
        return said, *self._word_map.show(maps)

    def ask(self, file: str | None, question: str) -> tuple[Any, ...]:
        """Answer a question."""
        image, question = open_upload(file), written(question, "question")
        with record_attention(self._vlm) as maps:
            said = self._vlm.ask(image, question)
        return said, *self._word_map.show(maps)

    def match(self, file: str | None, text: str) -> tuple[Any, ...]:
        """Say how well a text describes the picture."""
        image, text = open_upload(file), written(text, "text")
        with record_attention(self._vlm) as maps:
            share = self._vlm.match(image, text)
        return f"{share:.1%} that they belong together", *self._word_map.show(maps)
