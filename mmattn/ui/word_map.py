"""Pick a word, see where the model looked: of a text on a picture, or of a picture drawn from a prompt."""

from __future__ import annotations

from typing import Any

import gradio as gr

from mmattn.maps.record import AttentionMaps
from mmattn.maps.recordings import RecordedPicture
from mmattn.ui.handlers import MAPS_KEPT, on, still_there

_ALL = -1
_WHOLE = ""  # of a text: the mean over all that was generated


class WordMap:
    """The part of a tab that shows maps. Maps belong to one visitor: they are kept in the session's state.

    Args:
        message: the tab's line for what is wrong.
        label: of the words.
        has_heads: heads are kept apart and can be chosen.
    """

    def __init__(self, message: gr.HTML, label: str, *, has_heads: bool) -> None:
        self._has_heads = has_heads
        self.maps = gr.State(None, time_to_live=MAPS_KEPT)
        self.word = gr.Radio([], label=label, visible=False, elem_classes=["words"])
        self.picture = gr.Image(
            label="Map", show_label=False, format="png", interactive=False, visible=False, elem_classes=["map"],
            buttons=["download"],
        )  # fmt: skip
        with gr.Accordion("Layer and head" if has_heads else "Layer", open=False, visible=False) as self.choices:
            self.layer = gr.Dropdown([("mean of all", _ALL)], value=_ALL, label="Layer")
            self.head = gr.Dropdown([("mean of all", _ALL)], value=_ALL, label="Head", visible=has_heads)
        chosen = [self.maps, self.word, self.layer, self.head]
        events = [self.word.input, self.layer.input, self.head.input]
        on(events, self._draw, chosen, [self.picture], message)

    @property
    def outputs(self) -> list[Any]:
        """What `show` and `clear` give values for."""
        return [self.maps, self.word, self.picture, self.choices, self.layer, self.head]

    def show(self, maps: AttentionMaps) -> tuple[Any, ...]:
        """Maps that were just recorded; of several texts the first."""
        recorded = maps.texts[0]
        words = [(word, word) for word in recorded.words if any(letter.isalnum() for letter in word)]
        if not isinstance(recorded, RecordedPicture):
            words.insert(0, ("all words", _WHOLE))
        weights = recorded.weights
        layers = [(maps.layer_names.get(number, f"layer {number}"), number) for number in sorted(weights)]
        heads = [(f"head {number}", number) for number in range(next(iter(weights.values())).shape[-3])]
        # Of a prompt the first word that says something; articles look nowhere in particular.
        first = next((word for _, word in words if word == _WHOLE or len(word) > 2), words[0][1] if words else None)
        picture = None if first is None else self._draw(maps, first, _ALL, _ALL)[0]
        return (
            maps,
            gr.Radio(choices=words, value=first, visible=True),
            gr.Image(value=picture, visible=picture is not None),
            gr.Accordion(visible=True),
            gr.Dropdown(choices=[("mean of all", _ALL), *layers], value=_ALL),
            gr.Dropdown(choices=[("mean of all", _ALL), *heads], value=_ALL, visible=self._has_heads),
        )

    def clear(self) -> tuple[Any, ...]:
        """Nothing to show."""
        hidden = gr.Radio(choices=[], value=None, visible=False), gr.Image(value=None, visible=False)
        return None, *hidden, gr.Accordion(visible=False), gr.skip(), gr.skip()

    def _draw(self, maps: AttentionMaps | None, word: str, layer: int, head: int) -> tuple[Any, ...]:
        chosen: dict[str, Any] = {"layer": None if layer == _ALL else layer, "head": None if head == _ALL else head}
        return (still_there(maps).heatmap(word or None, **chosen).draw(beside=False),)
